"""One colour rule for all files, and reasons where a file is none."""

from __future__ import annotations

import os
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbegan.data import decode as decoding
from fastbegan.data.decode import Note, RejectedImageError, crop_box, read_bytes
from fastbegan.data.scale import scale


def decode(path: Path, size: int, crop: str) -> np.ndarray:
    (pixels,) = scale([decoding.decode(read_bytes(path), decoding.Decoding(crop)).pixels], size)
    return pixels


def whole(data: bytes) -> np.ndarray:
    return decoding.decode(data, decoding.Decoding("none")).pixels


def _png_header(width: int, height: int) -> bytes:
    """A PNG that declares this size and holds nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 64)) + chunk(b"IEND", b"")
    )


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


def test_celeba_faces(tmp_path: Path) -> None:
    assert crop_box((178, 218), "celeba") == (25, 50, 153, 178)
    with pytest.raises(RejectedImageError, match="100x100; the crop celeba takes the aligned images of 178x218"):
        crop_box((100, 100), "celeba")


@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_rotation(tmp_path: Path, orientation: int) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (12, 20, 3), np.uint8)
    exif = Image.Exif()
    exif[0x0112] = orientation
    plain, turned = tmp_path / "plain.jpg", tmp_path / "turned.jpg"
    Image.fromarray(pixels).save(plain, quality=95)
    Image.fromarray(pixels).save(turned, quality=95, exif=exif)
    seen = whole(read_bytes(plain))
    ways = [
        seen,
        seen[:, ::-1],
        seen[::-1, ::-1],
        seen[::-1],
        *(
            seen.swapaxes(0, 1)[a, b]
            for a, b in (
                (slice(None), slice(None)),
                (slice(None), slice(None, None, -1)),
                (slice(None, None, -1), slice(None, None, -1)),
                (slice(None, None, -1), slice(None)),
            )
        ),
    ]
    assert np.array_equal(whole(read_bytes(turned)), ways[orientation - 1])
    notes = decoding.decode(read_bytes(turned), decoding.Decoding("none")).notes
    assert notes == (Note.CONVERTED if orientation > 1 else 0)


def test_orientation_that_only_xmp_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    path = tmp_path / "turned.jpg"
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(path, xmp=xmp)
    first = decoding.decode(read_bytes(path), decoding.Decoding("none"))
    monkeypatch.setattr(decoding, "simplejpeg", None)
    second = decoding.decode(read_bytes(path), decoding.Decoding("none"))
    assert (first.height, first.width, first.notes) == (second.height, second.width, second.notes)


def test_both_jpeg_decoders_agree(orl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "face.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (30, 40, 3), np.uint8)
    Image.fromarray(pixels).resize((400, 300), Image.Resampling.BICUBIC).save(path, quality=90)
    first = decode(path, 64, "center")
    monkeypatch.setattr(decoding, "simplejpeg", None)
    assert np.abs(first.astype(int) - decode(path, 64, "center")).max() <= 1


def test_bit_rot_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "image.jpg"
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(pixels).save(path, quality=90)
    content = bytearray(path.read_bytes())
    content[-400:-398] = b"\xff\xd3"  # a restart marker where none belongs
    path.write_bytes(content)
    with pytest.raises(RejectedImageError):
        decode(path, 8, "center")


def test_nothing_waits_for_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    for path, reason in ((tmp_path / "pipe.jpg", "not a regular file"), (tmp_path / "none.jpg", "cannot be opened")):
        with pytest.raises(RejectedImageError, match=reason):
            read_bytes(path)


def test_a_stretch_of_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_bytes(b"0123456789")
    assert read_bytes(tmp_path / "file", 3, 4) == b"3456" and read_bytes(tmp_path / "file", 8) == b"89"
    monkeypatch.setattr(decoding, "MAX_BYTES", 9)
    with pytest.raises(RejectedImageError, match="accepted: up to"):
        read_bytes(tmp_path / "file")
