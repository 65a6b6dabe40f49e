"""Files that people really have: broken ones, ones that have to be converted, and links of all kinds."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
from PIL import Image

BROKEN = {
    "truncated.jpg": "",
    "empty.jpg": "cannot identify",
    "text.jpg": "cannot identify",
    "bomb.png": "declares 60000x60000|exceeds limit",
    "bomb.jpg": "declares 65000x65000|exceeds limit",
    "dangling.png": "cannot be opened",
    "pipe.jpg": "not a regular file",
}
CONVERTED = {
    "deep.png": (100, 100, 100),
    "cmyk.jpg": (255, 0, 0),
    "palette.png": (10, 20, 30),
    "alpha.png": (255, 127, 127),
    "turned.jpg": (40, 160, 90),
}


def png(size: tuple[int, int], bits: int, colours: int, pixels: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of one row, or one that holds less than it declares; `colours` is the standard's colour type."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", *size, bits, colours, 0, 0, 0))
    added = b"".join(chunk(kind, body) for kind, body in chunks)
    return b"\x89PNG\r\n\x1a\n" + header + added + chunk(b"IDAT", zlib.compress(b"\0" + pixels)) + chunk(b"IEND", b"")


def png_header(width: int, height: int) -> bytes:
    """A PNG that declares this size and holds nothing."""
    return png((width, height), 8, 2, b"\0" * 63)


def broken(folder: Path) -> None:
    """Every file of BROKEN."""
    good = folder / "truncated.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(good)
    content = good.read_bytes()
    good.write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpg").write_text("a letter")
    (folder / "bomb.png").write_bytes(png_header(60000, 60000))
    start = content.index(b"\xff\xc0")  # the frame's header: its height and width are at 5 and 7
    (folder / "bomb.jpg").write_bytes(content[: start + 5] + struct.pack(">HH", 65000, 65000) + content[start + 9 :])
    (folder / "dangling.png").symlink_to(folder / "nowhere.png")
    os.mkfifo(folder / "pipe.jpg")


def converted(folder: Path) -> None:
    """Every file of CONVERTED, each of one colour."""
    Image.fromarray(np.full((20, 20), 257 * 100, np.uint16)).save(folder / "deep.png")
    Image.new("CMYK", (20, 20), (0, 255, 255, 0)).save(folder / "cmyk.jpg", quality=100)
    Image.new("RGB", (20, 20), (10, 20, 30)).quantize(4).save(folder / "palette.png")
    Image.new("RGBA", (20, 20), (255, 0, 0, 128)).save(folder / "alpha.png")
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20), (40, 160, 90)).save(folder / "turned.jpg", quality=100, exif=exif)


def links(folder: Path) -> int:
    """Loops, mutual links, links to the same picture twice, hidden files; returns how many real pictures there are."""
    first, second = folder / "first", folder / "second"
    for number, place in enumerate((first, second)):
        place.mkdir()
        Image.new("RGB", (20, 20), (number, 0, 0)).save(place / "picture.png")
        (place / "loop").symlink_to(place)
    (first / "other").symlink_to(second)
    (second / "other").symlink_to(first)
    (folder / "again.png").symlink_to(first / "picture.png")
    os.link(second / "picture.png", folder / "hard.png")
    (folder / ".hidden.png").write_bytes(b"no picture")
    return 2
