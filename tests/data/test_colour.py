"""Pictures with ICC profiles or a gamma come back as sRGB, to two grey levels of the conversion in NumPy."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms, features

from fastbegan.data import decode as decoding
from fastbegan.data.colour import conversion
from fastbegan.data.decode import Decoding, Note, decode
from tests.helpers import profiles
from tests.helpers.profiles import ADOBE, P3, PROPHOTO, Space

WHOLE = Decoding("none")
SPACES = {"display-p3": P3, "adobe": ADOBE, "prophoto": PROPHOTO}
EXACT: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 100, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 100, "subsampling": "4:4:4"},
}
FORMATS = [
    pytest.param(name, marks=pytest.mark.skipif(name == "AVIF" and not features.check("avif"), reason="no AVIF"))
    for name in EXACT
]
SKIN = (210, 160, 130)
_LEVELS = np.array([0, 30, 128, 200, 255], np.uint8)
COLOURS = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS), -1).reshape(25, 5, 3)
COLOURS[0, 0] = SKIN
PATCHES = COLOURS.repeat(16, 0).repeat(16, 1)  # a JPEG keeps flat blocks


def encoded(image: Image.Image | np.ndarray, kind: str = "PNG", **options: Any) -> bytes:
    image = image if isinstance(image, Image.Image) else Image.fromarray(image)
    with io.BytesIO() as file:
        image.save(file, kind, **EXACT.get(kind, {}), **options)
        return file.getvalue()


def with_chunks(png: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG with these chunks after its header."""
    added = b"".join(struct.pack(">I", len(b)) + k + b + struct.pack(">I", zlib.crc32(k + b)) for k, b in chunks)
    return png[:33] + added + png[33:]


def furthest(pixels: np.ndarray, expected: np.ndarray | tuple[int, ...]) -> float:
    return float(np.abs(pixels - np.asarray(expected, float)).max())


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("name", SPACES)
def test_wide_colours_become_srgb(name: str, kind: str) -> None:
    space = SPACES[name]
    picture = decode(encoded(PATCHES, kind, icc_profile=space.profile()), WHOLE)
    assert picture.notes == Note.PROFILE
    # what libjpeg and AVIF round by a level, the matrix of the widest space enlarges
    plain = decode(encoded(PATCHES, kind), WHOLE).pixels
    assert furthest(picture.pixels, space.to_srgb(plain)) <= 2
    assert furthest(picture.pixels[8, 8], space.to_srgb(np.array(SKIN))) <= 2
    assert furthest(space.to_srgb(np.array(SKIN)), SKIN) > 5


def test_both_jpeg_decoders_convert_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    data = encoded(PATCHES, "JPEG", icc_profile=P3.profile())
    first = decode(data, WHOLE)
    monkeypatch.setattr(decoding, "simplejpeg", None)
    second = decode(data, WHOLE)
    assert first.notes == second.notes and furthest(first.pixels, second.pixels) <= 2


@pytest.mark.parametrize("kind", FORMATS)
def test_srgb_profiles_change_nothing(kind: str) -> None:
    for profile in (ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes(), profiles.SRGB.profile()):
        picture = decode(encoded(PATCHES, kind, icc_profile=profile), WHOLE)
        assert picture.notes == 0
        assert np.array_equal(picture.pixels, decode(encoded(PATCHES, kind), WHOLE).pixels)


@pytest.mark.parametrize("kind", FORMATS)
def test_broken_profiles_are_ignored(kind: str) -> None:
    good = P3.profile()
    for profile in (b"no profile", good[:200], good[:16] + b"XXXX" + good[20:], good[:128] + b"\xff" * 100):
        picture = decode(encoded(PATCHES, kind, icc_profile=profile), WHOLE)
        assert picture.notes == Note.PROFILE_IGNORED
        assert np.array_equal(picture.pixels, decode(encoded(PATCHES, kind), WHOLE).pixels)


@pytest.mark.parametrize(
    ("mode", "profile"),
    [
        ("L", P3.profile()),
        ("RGB", profiles.grey_profile(1.8)),
        ("RGB", profiles.cmyk_profile()),
        ("CMYK", P3.profile()),
    ],
    ids=["RGB in grey", "grey in RGB", "CMYK in RGB", "RGB in CMYK"],
)
@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_profiles_of_other_colours_are_ignored(mode: str, profile: bytes, kind: str) -> None:
    image = Image.new(mode, (8, 8), tuple(range(100, 100 + 10 * len(mode), 10)) if len(mode) > 1 else 100)
    with_it, without = (decode(encoded(image, kind, **o), WHOLE) for o in ({"icc_profile": profile}, {}))
    assert with_it.notes == without.notes | Note.PROFILE_IGNORED
    assert np.array_equal(with_it.pixels, without.pixels)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF"])
def test_grey_profiles(kind: str) -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16).repeat(16, 0).repeat(16, 1)
    picture = decode(encoded(levels, kind, icc_profile=profiles.grey_profile(1.0)), WHOLE)
    assert picture.notes == Note.PROFILE and picture.pixels.shape == (256, 256, 3)
    bright = levels >= 8  # below, a level of 8 bits is many of sRGB, and tables of lcms have steps
    expected = profiles.grey_to_srgb(levels, 1.0)[..., None]
    assert furthest(picture.pixels[bright], expected[bright]) <= 2
    assert furthest(expected, levels[..., None]) > 50
    picture = decode(encoded(Image.new("1", (8, 8), 1), "PNG", icc_profile=profiles.grey_profile(1.0)), WHOLE)
    assert picture.notes == Note.CONVERTED | Note.PROFILE and (picture.pixels == 255).all()


@pytest.mark.parametrize("kind", ["JPEG", "TIFF"])
def test_cmyk_profiles(kind: str) -> None:
    image = Image.new("CMYK", (8, 8), (0, 255, 255, 0))
    picture = decode(encoded(image, kind, icc_profile=profiles.cmyk_profile()), WHOLE)
    assert picture.notes == Note.CONVERTED | Note.PROFILE
    assert furthest(picture.pixels, (119, 119, 119)) <= 2  # two inks of 25 L* each


@pytest.mark.parametrize("kind", ["PNG", "WEBP", "TIFF"])
def test_colours_are_converted_before_they_lie_over_white(kind: str) -> None:
    picture = decode(encoded(Image.new("RGBA", (8, 8), (*SKIN, 128)), kind, icc_profile=ADOBE.profile()), WHOLE)
    assert picture.notes == Note.CONVERTED | Note.PROFILE
    share = 128 / 255
    assert furthest(picture.pixels, share * ADOBE.to_srgb(np.array(SKIN)) + (1 - share) * 255) <= 2


def test_grey_with_alpha_and_a_profile() -> None:
    picture = decode(encoded(Image.new("LA", (8, 8), (60, 128)), icc_profile=profiles.grey_profile(1.0)), WHOLE)
    assert picture.notes == Note.CONVERTED | Note.PROFILE
    share = 128 / 255
    assert furthest(picture.pixels, share * profiles.grey_to_srgb(np.array(60), 1.0) + (1 - share) * 255) <= 2


def test_palettes_with_a_profile() -> None:
    image = Image.new("RGB", (8, 8), SKIN).quantize(4)
    ways: list[tuple[dict[str, Any], float]] = [({}, 1.0), ({"transparency": b"\x80" * 4}, 128 / 255)]
    for options, share in ways:
        picture = decode(encoded(image, icc_profile=ADOBE.profile(), **options), WHOLE)
        assert picture.notes == Note.CONVERTED | Note.PROFILE
        assert furthest(picture.pixels, share * ADOBE.to_srgb(np.array(SKIN)) + (1 - share) * 255) <= 2


def test_sixteen_bits_with_a_grey_profile() -> None:
    data = encoded(np.full((8, 8), 257 * 60, np.uint16), icc_profile=profiles.grey_profile(1.0))
    picture = decode(data, WHOLE)
    assert picture.notes == Note.CONVERTED | Note.PROFILE
    assert furthest(picture.pixels, profiles.grey_to_srgb(np.array(60), 1.0)) <= 2


def test_turned_pictures_with_a_profile() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(PATCHES, "JPEG", exif=exif, icc_profile=P3.profile())
    picture = decode(data, WHOLE)
    assert picture.notes == Note.CONVERTED | Note.PROFILE
    plain = np.rot90(decode(encoded(PATCHES, "JPEG"), WHOLE).pixels, -1)
    assert furthest(picture.pixels, P3.to_srgb(plain)) <= 2


def _gamma(value: float) -> tuple[bytes, bytes]:
    return b"gAMA", struct.pack(">I", round(100000 * value))


def test_gamma_of_a_png() -> None:
    linear = Space(profiles.SRGB.red, profiles.SRGB.green, profiles.SRGB.blue, gamma=1.0)
    plain = encoded(COLOURS)
    picture = decode(with_chunks(plain, _gamma(1.0)), WHOLE)
    assert picture.notes == Note.PROFILE and furthest(picture.pixels, linear.to_srgb(COLOURS)) <= 0.51
    bright = Space(profiles.SRGB.red, profiles.SRGB.green, profiles.SRGB.blue, gamma=1 / 0.8)
    assert furthest(decode(with_chunks(plain, _gamma(0.8)), WHOLE).pixels, bright.to_srgb(COLOURS)) <= 0.51
    layers = encoded(Image.new("RGBA", (8, 8), (60, 60, 60, 128)))
    over_white = 128 / 255 * linear.to_srgb(np.array((60, 60, 60))) + (1 - 128 / 255) * 255
    assert furthest(decode(with_chunks(layers, _gamma(1.0)), WHOLE).pixels, over_white) <= 1
    for chunks in ((_gamma(0.45455),), (_gamma(0.45),), (_gamma(1.0), (b"sRGB", b"\0"))):
        picture = decode(with_chunks(plain, *chunks), WHOLE)
        assert picture.notes == 0 and np.array_equal(picture.pixels, COLOURS)
    picture = decode(with_chunks(plain, _gamma(0)), WHOLE)
    assert picture.notes == Note.PROFILE_IGNORED and np.array_equal(picture.pixels, COLOURS)


def test_a_png_follows_its_profile_first() -> None:
    for chunk in (_gamma(1.0), (b"sRGB", b"\0")):
        picture = decode(with_chunks(encoded(COLOURS, icc_profile=ADOBE.profile()), chunk), WHOLE)
        assert picture.notes == Note.PROFILE and furthest(picture.pixels, ADOBE.to_srgb(COLOURS)) <= 2


def test_texts_of_a_png_are_no_profiles() -> None:
    texts = ((b"tEXt", b"gamma\x001.0"), (b"tEXt", b"icc_profile\0none"))
    for text, notes in zip(texts, (Note(0), Note.PROFILE_IGNORED), strict=True):
        picture = decode(with_chunks(encoded(COLOURS), text), WHOLE)
        assert picture.notes == notes and np.array_equal(picture.pixels, COLOURS)


def test_one_conversion_a_profile() -> None:
    first, second = (conversion(bytes(bytearray(P3.profile())), "RGB") for _ in range(2))
    assert first is second is not None
