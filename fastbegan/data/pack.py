"""Packed image sets: one file of uint8 pixels [count, size, size, 3] behind a header, memory-mapped when read."""

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
OFFSET = 4096  # the header's room; pixels start on a page
_BLOCK = 1 << 24


class DamagedPackError(Exception):
    """The file is not a whole pack."""


@dataclass(frozen=True)
class PackHeader:
    """What a pack says of itself; `made_from` names source, crop and decoder by their hash."""

    count: int
    size: int
    crc32: int
    source: str
    made_from: str = ""


@dataclass(frozen=True)
class Part:
    """Some of a source's entries, `done` of them so far.

    `pixels` is uint8 [n, size, size, 3] of the good ones, `files` names those (entry, width, height, converted) where
    they are files, `broken` names the others with the reason.
    """

    done: int
    pixels: np.ndarray
    files: list[tuple[int, int, int, bool]]
    broken: list[tuple[str, str]]


@dataclass(frozen=True)
class Line:
    """A part as the journal keeps it: `count` images so far with the checksum `crc32` of their pixels."""

    done: int
    count: int
    crc32: int
    files: list[tuple[int, int, int, bool]]
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
    """Write a pack to `path`, which appears only when complete, and after `before` was called with its journal.

    `parts(start)` gives the source's parts from entry `start` on. What a killed process wrote of the same source is
    kept beside `path` and taken up again. Only one process may do this at a time: see `files.locked`.
    """
    partial, journal = leftovers(path)
    lines = _taken_up(partial, journal, made_from, size)
    start, count, crc = (lines[-1].done, lines[-1].count, lines[-1].crc32) if lines else (0, 0, 0)
    with partial.open("r+b" if lines else "w+b") as file, _journal(journal, made_from, lines) as note:
        file.truncate(OFFSET + count * size * size * 3)
        file.seek(0, os.SEEK_END)
        file.seek(max(OFFSET, file.tell()))
        for part in parts(start):
            if part.pixels.dtype != np.uint8 or part.pixels.shape[1:] != (size, size, 3):
                given = f"{part.pixels.dtype} {part.pixels.shape}"
                raise ValueError(f"pixels are {given}; accepted: uint8 [n, {size}, {size}, 3]")
            pixels = np.ascontiguousarray(part.pixels).data.cast("B") if part.pixels.size else b""
            file.write(pixels)
            file.flush()  # before the journal says that it is there
            crc, count = zlib.crc32(pixels, crc), count + len(part.pixels)
            lines.append(Line(part.done, count, crc, part.files, part.broken))
            note(lines[-1])
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
    """Where the pixels and the journal of an unfinished pack at `path` are."""
    return path.with_name(f".{path.name}.partial"), path.with_name(f".{path.name}.journal")


@contextlib.contextmanager
def _journal(path: Path, made_from: str, lines: list[Line]) -> Iterator[Callable[[Line], None]]:
    with path.open("w", encoding="utf-8") as file:

        def note(value: Any) -> None:
            file.write(json.dumps(value) + "\n")
            file.flush()

        note(made_from)
        for line in lines:
            note(vars(line))
        yield lambda line: note(vars(line))


def read_journal(path: Path, made_from: str) -> list[Line]:
    """Lines of a journal or catalogue of this source; none where it is another one's or not there."""
    try:
        first, *rest = path.read_text(encoding="utf-8").splitlines()
        if json.loads(first) != made_from:
            return []
    except (OSError, ValueError):
        return []
    lines: list[Line] = []
    for text in rest:
        try:
            found = Line(**json.loads(text))
        except (ValueError, TypeError):  # cut off in the middle
            break
        files = [(int(n), int(w), int(h), bool(c)) for n, w, h, c in found.files]
        lines.append(Line(found.done, found.count, found.crc32, files, [(a, b) for a, b in found.broken]))
    return lines


def _taken_up(partial: Path, journal: Path, made_from: str, size: int) -> list[Line]:
    """What is there already of this pack, no more of it than the pixels' checksum confirms."""
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
    while length > 0 and (block := file.read(min(length, _BLOCK))):
        crc, length = zlib.crc32(block, crc), length - len(block)
    return crc if length == 0 else -1


def read_pack(path: Path, *, check_below: int = 1 << 30) -> tuple[np.ndarray, PackHeader]:
    """Memory-map a pack: read-only uint8 [count, size, size, 3] and its header. Raises DamagedPackError.

    The checksum of packs of fewer bytes than `check_below` is verified.
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
