"""Which files count, and one colour rule for all of them."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbegan import UserError
from fastbegan.data.folder import RejectedImageError, check_crop, decode, list_images


def _png_header(width: int, height: int) -> bytes:
    """A PNG that declares this size and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


def test_each_picture_is_listed_once_whatever_links_there_are(pictures: Path) -> None:
    (pictures / "loop").symlink_to(pictures)
    (pictures / "nested" / "up").symlink_to(pictures / "nested")
    (pictures / "again.jpg").symlink_to(pictures / "02.jpg")
    (pictures / "dangling.png").symlink_to(pictures / "nowhere.png")
    (pictures / ".hidden.png").write_bytes(b"")
    (pictures / "notes.txt").write_text("notes")
    os.mkfifo(pictures / "pipe.jpg")
    listing = list_images(pictures)
    assert len(listing.images) == 12 and listing.images == sorted(listing.images)
    assert [(p.name, reason.partition(" (")[0]) for p, reason in listing.rejected] == [
        ("dangling.png", "cannot be opened"),
        ("pipe.jpg", "not a regular file"),
    ]
    assert [p.name for p in listing.others] == ["notes.txt"]


@pytest.mark.parametrize("bad", ["missing", "file"])
def test_no_folder_is_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=f"{bad}' (does not exist|is a file); accepted"):
        list_images(tmp_path / bad)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "cannot identify"),
        ("text.jpg", b"this is a letter", "cannot identify"),
        ("bomb.png", _png_header(8100, 8100), "declares 8100x8100, over 64 megapixels"),
        ("huge.png", _png_header(60000, 60000), "exceeds limit"),
    ],
)
def test_broken_files_are_rejected_with_a_reason(tmp_path: Path, name: str, content: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RejectedImageError, match=reason):
        decode(tmp_path / name, 8, "center")


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_truncated_files_are_rejected(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"image.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(RejectedImageError):
        decode(path, 8, "center")


def _constant(path: Path, size: int = 4) -> list[int]:
    pixels = decode(path, size, "center")
    assert pixels.shape == (size, size, 3) and pixels.dtype == np.uint8
    assert (pixels == pixels[0, 0]).all()
    return pixels[0, 0].tolist()


def test_colours(tmp_path: Path) -> None:
    def saved(name: str, image: Image.Image) -> Path:
        image.save(tmp_path / name)
        return tmp_path / name

    half_red = Image.new("RGBA", (8, 8), (255, 0, 0, 128))
    assert _constant(saved("alpha.png", half_red)) == [255, 127, 127]  # over white
    assert _constant(saved("grey.png", Image.new("L", (8, 8), 77))) == [77, 77, 77]
    deep = Image.fromarray(np.full((8, 8), 257 * 100, np.uint16))
    assert _constant(saved("deep.png", deep)) == [100, 100, 100]
    dark = Image.fromarray(np.full((8, 8), 200, np.uint16))
    assert _constant(saved("dark.png", dark)) == [1, 1, 1]
    assert _constant(saved("palette.png", Image.new("RGB", (8, 8), (10, 20, 30)).quantize(4))) == [10, 20, 30]
    cmyk = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    assert _constant(saved("cmyk.tif", cmyk)) == [255, 0, 0]
    assert _constant(saved("one.png", Image.new("1", (8, 8), 1))) == [255, 255, 255]


def test_crops_and_rotation(tmp_path: Path) -> None:
    pixels = np.zeros((40, 80, 3), np.uint8)
    pixels[:, 20:60] = 255  # the centre square is white, the rest black
    path = tmp_path / "wide.png"
    Image.fromarray(pixels).save(path)
    assert (decode(path, 8, "center") == 255).all()
    assert (decode(path, 8, "20") == 255).all()
    assert decode(path, 8, "none")[:, 0].max() == 0
    exif = Image.Exif()
    exif[0x0112] = 6  # stored on its side
    Image.fromarray(pixels.swapaxes(0, 1)).save(path, exif=exif)
    assert (decode(path, 8, "center") == 255).all()
    assert decode(path, 8, "none")[:, 0].max() == 0


def test_scaling_down_is_antialiased(tmp_path: Path) -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    small = decode(tmp_path / "stripes.png", 8, "center")
    assert small.min() > 110 and small.max() < 145


@pytest.mark.parametrize("crop", ["", "middle", "0", "-3", "2.5"])
def test_wrong_crops_are_named(crop: str) -> None:
    with pytest.raises(UserError, match="accepted: center, none, or a number of pixels"):
        check_crop(crop)
