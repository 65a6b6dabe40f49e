"""Packed image sets: one file of uint8 pixels [count, size, size, 3] behind a header, memory-mapped when read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from ..files import atomic

_MAGIC = b"FASTBEGAN PACK 1\n"
_OFFSET = 4096  # the header's room; pixels start on a page
_CHECK_BELOW = 1 << 30  # bytes whose checksum is verified whenever the file is opened


class DamagedPackError(Exception):
    """The file is not a whole pack."""


@dataclass(frozen=True)
class PackHeader:
    """What a pack says of itself."""

    count: int
    size: int
    crc32: int
    source: str


def write_pack(path: Path, chunks: Iterable[np.ndarray], size: int, source: str) -> PackHeader:
    """Write uint8 chunks [n, size, size, 3] to `path`, which appears only when complete."""
    count, crc = 0, 0
    with atomic(path) as file:
        file.seek(_OFFSET)
        for chunk in chunks:
            if chunk.dtype != np.uint8 or chunk.shape[1:] != (size, size, 3):
                raise ValueError(f"chunk is {chunk.dtype} {chunk.shape}; accepted: uint8 [n, {size}, {size}, 3]")
            pixels = np.ascontiguousarray(chunk).data
            file.write(pixels)
            crc = zlib.crc32(pixels, crc)
            count += len(chunk)
        header = PackHeader(count, size, crc, source)
        file.seek(0)
        file.write((_MAGIC + json.dumps(asdict(header)).encode()).ljust(_OFFSET - 1) + b"\n")
    return header


def read_pack(path: Path) -> tuple[np.ndarray, PackHeader]:
    """Memory-map a pack: read-only uint8 [count, size, size, 3] and its header. Raises DamagedPackError."""
    with path.open("rb") as file:
        start = file.read(_OFFSET)
    if not start.startswith(_MAGIC):
        raise DamagedPackError(f"{path} does not start like a pack")
    try:
        header = PackHeader(**json.loads(start[len(_MAGIC) :]))
    except (ValueError, TypeError) as error:
        raise DamagedPackError(f"{path} has an unreadable header: {error}") from None
    length = header.count * header.size * header.size * 3
    if path.stat().st_size != _OFFSET + length:
        raise DamagedPackError(f"{path} is {path.stat().st_size} bytes; its header says {_OFFSET + length}")
    if length == 0:
        return np.empty((0, header.size, header.size, 3), np.uint8), header
    images = np.memmap(path, np.uint8, "r", _OFFSET, (header.count, header.size, header.size, 3))
    if length < _CHECK_BELOW and zlib.crc32(images.data) != header.crc32:
        raise DamagedPackError(f"{path} does not match its checksum")
    return images, header
