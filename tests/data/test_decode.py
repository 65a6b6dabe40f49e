"""One colour rule for all files, and reasons where a file is none."""

from __future__ import annotations

import io
import os
import struct
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from fastbegan.data import decode as decoding
from fastbegan.data.decode import SUFFIXES, Decoding, Note, RejectedImageError, crop_box, is_picture, read_bytes
from fastbegan.data.jpeg import read_marks
from fastbegan.data.scale import scale
from tests.helpers.profiles import P3
from tests.helpers.zoo import png, png_header

WHOLE = Decoding("none")


def decode(path: Path, size: int, crop: str) -> np.ndarray:
    (pixels,) = scale([decoding.decode(read_bytes(path), Decoding(crop)).pixels], size)
    return pixels


def whole(data: bytes) -> np.ndarray:
    return decoding.decode(data, WHOLE).pixels


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with io.BytesIO() as file:
        image.save(file, kind, **options)
        return file.getvalue()


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("empty.jpg", b"", "cannot identify"),
        ("text.jpg", b"this is a letter", "cannot identify"),
        ("bomb.png", png_header(8100, 8100), "declares 8100x8100, over 64 megapixels; --max-pixels sets"),
        ("huge.png", png_header(60000, 60000), "exceeds limit of 64 megapixels; --max-pixels sets"),
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
    notes = decoding.decode(read_bytes(turned), WHOLE).notes
    assert notes == (Note.CONVERTED if orientation > 1 else 0)


def test_orientation_that_only_xmp_tells(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF><rdf:Description tiff:Orientation="6"/></rdf:RDF></x:xmpmeta>'
    path = tmp_path / "turned.jpg"
    Image.fromarray(np.zeros((20, 40, 3), np.uint8)).save(path, xmp=xmp)
    first = decoding.decode(read_bytes(path), WHOLE)
    monkeypatch.setattr(decoding, "simplejpeg", None)
    second = decoding.decode(read_bytes(path), WHOLE)
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


RANDOM = np.random.default_rng(0).integers(0, 256, (24, 32, 3), np.uint8)
TURNED = b"Exif\0\0MM\0*" + struct.pack(">IHHHIHHI", 8, 1, 0x0112, 3, 1, 6, 0, 0)


def with_segments(jpeg: bytes, *segments: tuple[int, bytes], fill: int = 0) -> bytes:
    """A JPEG with these segments after its first marker, each after `fill` more bytes of 0xFF."""
    added = b"".join(b"\xff" * (1 + fill) + struct.pack(">BH", kind, len(body) + 2) + body for kind, body in segments)
    return jpeg[:2] + added + jpeg[2:]


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_plain_jpegs_never_reach_pillow(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    image = Image.fromarray(RANDOM).convert(mode)
    plain = encoded(image, "JPEG")
    files = [
        plain,
        encoded(image, "JPEG", xmp=b"<x:xmpmeta/>"),
        with_segments(plain, (0xFE, b"\xff\xe1\0\x20Exif\0\0Orientation")),
    ]
    if mode == "RGB":
        files.append(encoded(image, "JPEG", icc_profile=srgb))
    before = [whole(file) for file in files]

    def opened(*_: object, **__: object) -> None:
        raise AssertionError("Pillow was asked")

    monkeypatch.setattr(Image, "open", opened)
    for file, pixels in zip(files, before, strict=True):
        assert np.array_equal(whole(file), pixels) and np.array_equal(pixels, before[0])


def test_rotation_is_found_wherever_it_is() -> None:
    plain = encoded(RANDOM, "JPEG")
    exif, padding = (0xE1, TURNED), (0xE2, b"MPX\0" + bytes(65529))
    profile = (0xE2, b"ICC_PROFILE\0\1\1" + ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    xmp = (0xE1, b'http://ns.adobe.com/xap/1.0/\0<rdf:Description tiff:Orientation="6"/>')
    expected = np.rot90(whole(plain), -1)
    for segments in ((exif,), (padding, padding, padding, exif), (profile, exif), (exif, profile), (padding, xmp)):
        for fill in (0, 3):
            picture = decoding.decode(with_segments(plain, *segments, fill=fill), WHOLE)
            assert picture.notes == Note.CONVERTED and np.array_equal(picture.pixels, expected)
    in_a_scan = plain[:-2] + b"\xff\xe1" + struct.pack(">H", len(TURNED) + 2) + TURNED
    assert not read_marks(in_a_scan).may_be_turned


def test_a_profile_in_parts() -> None:
    plain, profile = encoded(RANDOM, "JPEG"), P3.profile()
    parts = [
        (0xE2, b"ICC_PROFILE\0" + bytes((number + 1, 3)) + profile[start : start + 10000])
        for number, start in enumerate((0, 10000, 20000))
    ]
    for order in (parts, parts[::-1], [parts[1], (0xE1, TURNED), parts[0], parts[2]]):
        data = with_segments(plain, *order)
        assert read_marks(data).info == {"icc_profile": profile}
        assert decoding.decode(data, WHOLE).notes & ~Note.CONVERTED == Note.PROFILE
    for disorder in (parts[:2], parts[1:], [(0xE2, b"ICC_PROFILE\0\1\1")]):
        picture = decoding.decode(with_segments(plain, *disorder), WHOLE)
        assert picture.notes == Note.PROFILE_IGNORED
        assert np.abs(picture.pixels.astype(int) - whole(plain)).max() <= 1


def test_jpegs_cut_within_their_headers_are_refused() -> None:
    data = with_segments(encoded(RANDOM, "JPEG"), (0xE1, TURNED), (0xE2, b"ICC_PROFILE\0\1\1" + bytes(20)))
    for length in range(2, data.index(b"\xff\xda") + 8):
        read_marks(data[:length])
        with pytest.raises(RejectedImageError, match=r"\w"):
            whole(data[:length])
    for length in (0, 1):  # no segment is as short
        assert read_marks(data[:2] + b"\xff\xe3" + struct.pack(">H", length) + data[2:]) == read_marks(data)


def _no_bytes(value: object) -> str | None:
    """Names tests by the other arguments."""
    return "" if isinstance(value, bytes) else None


def _float(values: list[float]) -> bytes:
    return encoded(Image.fromarray(np.array([values], np.float32)), "TIFF")


def _integer(values: list[int]) -> bytes:
    return encoded(Image.fromarray(np.array([values], np.int32)), "TIFF")


def _sixteen(values: list[int], kind: str = "PNG") -> bytes:
    return encoded(Image.fromarray(np.array([values], np.uint16)), kind)


@pytest.mark.parametrize(
    ("data", "levels", "notes"),
    [
        (_float([0, 0.25, 0.5, 1]), [0, 64, 128, 255], 0),
        (_integer([0, 100, 255]), [0, 100, 255], 0),
        (_integer([0, 257 * 100, 65535]), [0, 100, 255], 0),
        (_integer([0, 4095]), [0, 16], Note.FEW_BITS),
        (_sixteen([0, 257 * 100, 65535]), [0, 100, 255], 0),
        (_sixteen([0, 257 * 100, 65535], "TIFF"), [0, 100, 255], 0),
        (_sixteen([0, 257 * 100, 65535], "PPM"), [0, 100, 255], 0),
        (_sixteen([0, 4095]), [0, 16], Note.FEW_BITS),
        (_sixteen([0, 4096]), [0, 16], 0),
        (_sixteen([0, 255], "TIFF"), [0, 1], Note.FEW_BITS),
        (_sixteen([0, 255], "PPM"), [0, 1], Note.FEW_BITS),
        (_sixteen([0, 0]), [0, 0], 0),
    ],
    ids=_no_bytes,
)
def test_depths(data: bytes, levels: list[int], notes: int) -> None:
    picture = decoding.decode(data, WHOLE)
    assert picture.notes == Note.CONVERTED | notes
    assert picture.pixels.tolist() == [[[level] * 3 for level in levels]]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (_float([-1, 0.5, 1]), "float values from -1 to 1; accepted: 0 to 1"),
        (_float([0, 255]), "float values from 0 to 255; accepted: 0 to 1"),
        (_float([0, float("nan")]), "float values with NaN or infinity; accepted: 0 to 1"),
        (_float([0, float("inf")]), "float values with NaN or infinity; accepted: 0 to 1"),
        (_integer([-5, 100]), "integer values from -5 to 100; accepted: 0 to 65535"),
        (_integer([0, 70000]), "integer values from 0 to 70000; accepted: 0 to 65535"),
    ],
    ids=_no_bytes,
)
def test_ranges_that_do_not_tell_their_white_are_refused(data: bytes, reason: str) -> None:
    with pytest.raises(RejectedImageError, match=f"^{reason}$"):
        whole(data)


def test_transparency_in_sixteen_bits() -> None:
    grey = struct.pack(">3H", 30000, 30001, 0)
    picture = decoding.decode(png((3, 1), 16, 0, grey, (b"tRNS", struct.pack(">H", 30000))), WHOLE)
    assert picture.notes == Note.CONVERTED and picture.pixels[0, :, 0].tolist() == [255, 117, 0]
    layers = struct.pack(">6H", 30000, 65535, 30000, 0, 0, 0x8080)
    picture = decoding.decode(png((3, 1), 16, 4, layers), WHOLE)
    assert picture.notes == Note.CONVERTED and picture.pixels[0, :, 0].tolist() == [117, 255, 127]
    colours = struct.pack(">6H", 65535, 256, 0, 1000, 2000, 3000)
    picture = decoding.decode(png((2, 1), 16, 2, colours, (b"tRNS", struct.pack(">3H", 65535, 256, 0))), WHOLE)
    assert picture.notes == Note.CONVERTED and picture.pixels.tolist() == [[[255] * 3, [3, 7, 11]]]


WRITTEN: dict[str, dict[str, Any]] = {
    "JPEG": {},
    "PNG": {},
    "GIF": {},
    "BMP": {},
    "DIB": {},
    "PPM": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "JPEG2000": {},
    "QOI": {},
    "AVIF": {},
    "TGA": {},
    "MPO": {"save_all": True, "append_images": [Image.fromarray(RANDOM[::-1].copy())]},
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_formats(kind: str) -> None:
    if kind == "AVIF" and not features.check("avif"):
        pytest.skip("no AVIF")
    if kind == "QOI" and kind not in Image.SAVE:
        pytest.skip("this Pillow only reads QOI")
    data = encoded(np.full((24, 32, 3), 90, np.uint8), kind, **WRITTEN[kind])
    assert is_picture(data) == is_picture(data[:16]) == (kind != "TGA")
    for length in range(12):
        is_picture(data[:length])
    picture = decoding.decode(data, WHOLE)
    assert picture.pixels.shape == (24, 32, 3) and np.abs(picture.pixels.astype(int) - 90).max() <= 2
    assert {
        suffix for suffix, name in Image.registered_extensions().items() if name == kind
    } & SUFFIXES or kind == "MPO"


@pytest.mark.parametrize("mode", ["1", "L", "RGB", "F", "I;16", "RGBA", "P"])
def test_modes_of_simple_formats(mode: str) -> None:
    kinds = {"F": ("TIFF", "PPM"), "I;16": ("TIFF", "PPM", "PNG"), "RGBA": ("TIFF", "PNG", "WEBP", "JPEG2000")}
    for kind in kinds.get(mode, ("TIFF", "PNG", "GIF", "BMP", *(("PPM",) if mode != "P" else ()))):
        image = Image.new(mode, (8, 8), 1) if mode != "P" else Image.new("RGB", (8, 8), "red").quantize(4)
        data = encoded(image, kind)
        assert is_picture(data[:16]) and whole(data).shape == (8, 8, 3)


def test_what_is_no_picture() -> None:
    texts = (b"", b"BM", b"P", b"P3", b"BMW is a maker of cars", b"P is a letter", b"P3 players in a list")
    for head in (*texts, b"RIFF\0\0\0\0WAVEfmt ", b"\x28" + bytes(63), bytes(64)):
        assert not is_picture(head)
    assert not is_picture(b"%!PS-Adobe-3.0 EPSF-3.0\n") and not is_picture(b"\0\0\0\x20ftypisom" + bytes(8))


def test_no_other_plugin_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {kind: encoded(RANDOM, kind) for kind in ("EPS", "PCX", "SGI", "ICO", "DDS")}
    seen = []
    for kind, (factory, accept) in list(Image.OPEN.items()):
        if kind not in decoding.FORMATS:
            monkeypatch.setitem(Image.OPEN, kind, (factory, lambda _, kind=kind: bool(seen.append(kind))))
        assert accept is not None or kind not in decoding.FORMATS or kind == "TGA"
    for data in files.values():
        with pytest.raises(RejectedImageError, match="cannot identify"):
            whole(data)
    assert not seen


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG", "TIFF"])
def test_animations_give_their_first_frame(kind: str) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **WRITTEN[kind])
    assert np.abs(whole(data).astype(int) - (255, 0, 0)).max() <= 2


def test_the_limit_of_pixels_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 100)  # Pillow's own is lower than ours may be
    for kind in ("JPEG", "PNG", "TIFF", "WEBP", "BMP"):
        data = encoded(RANDOM, kind)  # 768 pixels
        assert decoding.decode(data, Decoding("none", 768)).pixels.shape == (24, 32, 3)
        with pytest.raises(RejectedImageError, match=r"^declares 32x24, over 0.000767 megapixels; --max-pixels sets"):
            decoding.decode(data, Decoding("none", 767))
    assert Image.MAX_IMAGE_PIXELS == 768


def _warning_files() -> dict[str, bytes]:
    exif = Image.Exif()
    exif[0x010E] = "a description that is longer than four bytes"
    corrupt = exif.tobytes()[:-30]
    palette = Image.fromarray(RANDOM).quantize(16)
    tiff, entry = encoded(RANDOM, "TIFF"), struct.pack("<HH", 0x011C, 3)  # its planar configuration, once
    assert tiff.count(entry + struct.pack("<I", 1)) == 1
    return {
        "corrupt EXIF": encoded(RANDOM, "JPEG", exif=corrupt),
        "a palette with transparency": encoded(palette, transparency=bytes(range(0, 256, 16))),
        "a tag with too many values": tiff.replace(entry + struct.pack("<I", 1), entry + struct.pack("<I", 2)),
        "an animation without frames": png((2, 1), 8, 0, b"\x10\x20", (b"acTL", bytes(8))),
    }


@pytest.mark.parametrize("name", _warning_files())
def test_no_file_makes_python_warn(name: str) -> None:
    data = _warning_files()[name]
    with warnings.catch_warnings(record=True) as raised:
        warnings.simplefilter("always")
        with Image.open(io.BytesIO(data)) as image:
            image.getexif()
            image.load()
            image.convert("RGB")
        assert raised  # else this test tells nothing
        raised.clear()
        for _ in range(2):
            assert whole(data).shape[2] == 3
        assert not raised
        warnings.warn("others are still heard", stacklevel=1)
        assert len(raised) == 1
