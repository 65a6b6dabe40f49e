"""Packs: one file of uint8 pixels [count, size, size, 3] behind a header, memory-mapped when read.

- NAME.pack: a magic line, the header as JSON, padding to OFFSET bytes, then the pixels. It appears when complete.
- .NAME.pack.partial: the same while it is being written, with an empty header.
- .NAME.pack.journal: JSON lines beside it, first what the pack is made from, then a `Line` per part. After a kill the
  journal says how many entries are done, and its checksums confirm the pixels.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np

from ..files import sync_folder

_MAGIC = b"FASTBEGAN PACK 1\n"
OFFSET = 4096  # bytes of the header, so that pixels start on a memory page
_BLOCK = 1 << 24  # bytes that a checksum reads at once


class DamagedPackError(Exception):
    """The file is not a complete pack."""


@dataclass(frozen=True)
class PackHeader:
    """The header of a pack."""

    count: int
    size: int
    """Height and width of the images."""
    crc32: int
    """Checksum of all pixels."""
    source: str
    """Its description, for people."""
    made_from: str = ""
    """Hash of source, crop and decoder."""


@dataclass(frozen=True)
class Part:
    """Decoded images of consecutive entries of a source."""

    done: int
    """Entries of the source up to the end of this part."""
    pixels: np.ndarray
    """The good images: uint8 [n, size, size, 3]."""
    files: list[tuple[int, int, int, int]]
    """Entry, width, height and `decode.Note` of each good image that is a file."""
    broken: list[tuple[str, str]]
    """Name and reason of each entry that cannot be decoded."""


@dataclass(frozen=True)
class Line:
    """A part as the journal records it; `count` images so far have the checksum `crc32`."""

    done: int
    count: int
    crc32: int
    files: list[tuple[int, int, int, int]]
    broken: list[tuple[str, str]]


def write_pack(
    path: Path,
    parts: Callable[[int], Iterable[Part]],
    *,
    size: int,
    source: str,
    made_from: str,
    before: Callable[[list[Line]], None] = lambda lines: None,
) -> None:
    """Write a pack to `path`; resume what a killed process left of the same source.

    Only one process may write a pack at a time: see `files.locked`.

    Args:
        path: The file, which appears when it is complete.
        parts: Called with an entry number, yields the source's parts from that entry on.
        size: Height and width of the images.
        source: Description of the source, for the header.
        made_from: Hash of source, crop and decoder; leftovers with another hash are not resumed.
        before: Called with the journal's lines before the file appears.

    Raises:
        ValueError: A part's pixels have another dtype or shape.
        OSError: The system refuses to write.
    """
    partial, journal = leftovers(path)
    lines = _confirmed(partial, journal, made_from, size)
    start, count, crc = (lines[-1].done, lines[-1].count, lines[-1].crc32) if lines else (0, 0, 0)
    with partial.open("r+b" if lines else "w+b") as file, _journal(journal, made_from, lines) as record:
        file.truncate(OFFSET + count * size * size * 3)
        file.seek(0, os.SEEK_END)
        file.seek(max(OFFSET, file.tell()))
        for part in parts(start):
            if part.pixels.dtype != np.uint8 or part.pixels.shape[1:] != (size, size, 3):
                kind = f"{part.pixels.dtype} {part.pixels.shape}"
                raise ValueError(f"pixels are {kind}; accepted: uint8 [n, {size}, {size}, 3]")
            pixels = np.ascontiguousarray(part.pixels).data.cast("B") if part.pixels.size else b""
            file.write(pixels)
            file.flush()  # the journal must not name pixels that are not in the file
            crc, count = zlib.crc32(pixels, crc), count + len(part.pixels)
            lines.append(Line(part.done, count, crc, part.files, part.broken))
            record(lines[-1])
        header = PackHeader(count, size, crc, source, made_from)
        file.seek(0)
        file.write((_MAGIC + json.dumps(asdict(header)).encode()).ljust(OFFSET - 1) + b"\n")
        file.flush()
        os.fsync(file.fileno())
    before(lines)
    partial.replace(path)
    journal.unlink()
    sync_folder(path.parent)


def leftovers(path: Path) -> tuple[Path, Path]:
    """Paths of the pixels and of the journal of an unfinished pack at `path`."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.journal")


@contextlib.contextmanager
def _journal(path: Path, made_from: str, lines: list[Line]) -> Iterator[Callable[[Line], None]]:
    """Start a journal with `lines`; yields the function that appends one."""
    with path.open("w", encoding="utf-8") as file:

        def write(value: Any) -> None:
            file.write(json.dumps(value) + "\n")
            file.flush()

        write(made_from)
        for line in lines:
            write(vars(line))
        yield lambda line: write(vars(line))


def read_journal(path: Path, made_from: str) -> list[Line]:
    """Read the lines of a journal or catalogue; none where the file is missing or was made from something else."""
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != made_from:
            return []
    except (OSError, ValueError):
        return []
    lines: list[Line] = []
    for text in rest:
        try:
            line = Line(**json.loads(text))
        except (ValueError, TypeError):  # a kill cut the last line off
            break
        files = [(int(n), int(w), int(h), int(notes)) for n, w, h, notes in line.files]
        lines.append(Line(line.done, line.count, line.crc32, files, [(a, b) for a, b in line.broken]))
    return lines


def _confirmed(partial: Path, journal: Path, made_from: str, size: int) -> list[Line]:
    """Lines of an unfinished pack up to the last one whose checksum the pixels confirm."""
    lines = read_journal(journal, made_from)
    if not lines or not partial.exists():
        return []
    with partial.open("rb") as file:
        file.seek(OFFSET)
        good, crc, count = 0, 0, 0
        for number, line in enumerate(lines, 1):
            crc = _crc(file, (line.count - count) * size * size * 3, crc)
            count = line.count
            if crc == line.crc32:
                good = number
    return lines[:good]


def _crc(file: IO[bytes], length: int, crc: int) -> int:
    """`crc` continued over the next `length` bytes; -1 where the file is shorter."""
    while length > 0 and (block := file.read(min(length, _BLOCK))):
        crc, length = zlib.crc32(block, crc), length - len(block)
    return crc if length == 0 else -1


def read_pack(path: Path, *, check_below: int = 1 << 30) -> tuple[np.ndarray, PackHeader]:
    """Memory-map a pack: read-only uint8 [count, size, size, 3], and its header.

    Packs of fewer than `check_below` bytes have their checksum verified. Raises DamagedPackError.
    """
    with path.open("rb") as file:
        start = file.read(OFFSET)
    if not start.startswith(_MAGIC):
        raise DamagedPackError(f"{path} does not start like a pack")
    try:
        header = PackHeader(**json.loads(start[len(_MAGIC) :]))
        if not (isinstance(header.count, int) and isinstance(header.size, int) and header.count >= 0 < header.size):
            raise ValueError(f"{header.count!r} images of {header.size!r} px")
    except (ValueError, TypeError) as error:
        raise DamagedPackError(f"{path} has an unreadable header: {error}") from None
    length = header.count * header.size * header.size * 3
    if path.stat().st_size != OFFSET + length:
        raise DamagedPackError(f"{path} is {path.stat().st_size} bytes; its header says {OFFSET + length}")
    if length == 0:
        return np.empty((0, header.size, header.size, 3), np.uint8), header
    images = np.memmap(path, np.uint8, "r", OFFSET, (header.count, header.size, header.size, 3))
    if length < check_below and zlib.crc32(images.data) != header.crc32:
        raise DamagedPackError(f"{path} does not match its checksum")
    return images, header
