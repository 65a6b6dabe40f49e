"""One picture file to RGB pixels, or the reason for refusing it. No torch here: worker processes import this."""

from __future__ import annotations

import enum
import io
import math
import os
import re
import stat
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageCms, ImageOps

from ..errors import UserError
from .colour import UnusableProfileError, conversion, gamma_table
from .jpeg import read_marks

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: PIL decodes JPEG too, more slowly
    simplejpeg = None

VERSION = 3  # to be raised whenever the same file gives other pixels
MAX_PIXELS = 64_000_000  # a header that declares more is refused before decoding
_MOST_PIXELS = 10**10  # that may be asked for
MAX_BYTES = 256 << 20  # of a file
CROPS = ("center", "none", "celeba")
SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .j2k .jfif .jp2 .jpc .jpe .jpeg .jpg .jpx .pbm .pgm .png .pnm .ppm .qoi .tga"
    " .tif .tiff .webp".split()
)
"""Lower-case suffixes of picture files."""
# What Pillow may take a file for: other plugins would start programs (EPS) or have seen few hostile files. TGA is last,
# since it has no magic number.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "DIB", "PPM", "WEBP", "TIFF", "JPEG2000", "QOI")
FORMATS += ("AVIF",) * (find_spec("PIL.AvifImagePlugin") is not None) + ("TGA",)
_MAGIC = re.compile(
    rb"\xff\xd8\xff|\x89PNG\r\n\x1a\n|GIF8[79]a|RIFF....WEBP|qoif|P[1-6f]\s+[\d#]"
    rb"|\xff\x4f\xff\x51|\0\0\0\x0cjP  \r\n\x87\n"  # JPEG 2000: its codestream, its file
    rb"|....ftyp(?:avi[fs]|m[is]f1)"  # mif1, msf1: the brand of AVIF may come later
    rb"|II[*+]\0|MM\0[*+]"
    rb"|BM.{12}[\x0c\x28\x34\x38\x40\x6c\x7c]\0"  # BMP: the size of its second header
    rb"|\x0c\0{3}.{4}\x01\0|[\x28\x34\x38\x40\x6c\x7c]\0{3}.{8}\x01\0",  # DIB: that header alone, one plane
    re.DOTALL,
)
_CELEBA = (178, 218)  # the aligned and cropped images of CelebA ...
_CELEBA_FACE = (25, 50, 153, 178)  # ... and the square of 128 pixels around the face
_ORIENTATION = 0x0112
_ALPHA = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
_PLAIN = frozenset(("L", "RGB"))
_OF_PILLOW = r"PIL\."
_QUIET = ("ignore", None, Warning, re.compile(_OF_PILLOW), 0)


@dataclass(frozen=True)
class Decoding:
    """What to make of picture files: the part that is kept, and the largest that is decoded."""

    crop: str = "center"
    """`center` (largest square), `none` (all, stretched), `celeba`, or a number of pixels."""
    max_pixels: int = MAX_PIXELS
    """A picture that declares more is refused before it is decoded."""

    def __post_init__(self) -> None:
        if self.crop not in CROPS and not (self.crop.isdecimal() and int(self.crop) > 0):
            raise UserError(f"crop is {self.crop!r}; accepted: {', '.join(CROPS)}, or a number of pixels")
        if not 1 <= self.max_pixels <= _MOST_PIXELS:
            raise UserError(f"max_pixels is {self.max_pixels}; accepted: 1 to {_MOST_PIXELS}")


class RejectedImageError(Exception):
    """The file cannot be decoded; the message is the reason."""


class Note(enum.IntFlag):
    """What the decoder did to a picture, or noticed, that its owner should know. Packs and reports keep the numbers."""

    CONVERTED = 1
    """Rotated, or brought to 8-bit RGB from another mode."""
    PROFILE = 2
    """Brought to sRGB from the colours of its ICC profile, or from the gamma that a PNG declares."""
    PROFILE_IGNORED = 4
    """Taken for sRGB, since its profile is damaged or describes another kind of colours."""
    FEW_BITS = 8
    """Stored in 16 bits of which it uses 12 or fewer: it comes out dark, as nothing tells its white."""


@dataclass(frozen=True)
class Picture:
    """A decoded file."""

    height: int
    width: int
    """Before the crop, after the rotation."""
    notes: Note
    pixels: np.ndarray
    """The crop: uint8 [rows, columns, 3]."""


def read_bytes(path: Path | str, offset: int = 0, length: int | None = None) -> bytes:
    """Read a file, or a range of its bytes.

    Args:
        path: The file.
        offset: First byte.
        length: Number of bytes; None reads to the end.

    Raises:
        RejectedImageError: The file cannot be read, is too large, or is not regular (a FIFO would block).
    """
    try:
        handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        try:
            status = os.fstat(handle)
            if not stat.S_ISREG(status.st_mode):
                raise RejectedImageError("not a regular file")
            count = max(0, status.st_size - offset) if length is None else length
            if count > MAX_BYTES:
                raise RejectedImageError(f"{count / 2**20:,.0f} MiB; accepted: up to {MAX_BYTES >> 20} MiB")
            os.lseek(handle, offset, os.SEEK_SET)
            return os.read(handle, count)
        finally:
            os.close(handle)
    except OSError as error:
        raise RejectedImageError(f"cannot be opened ({error.strerror})") from None


def is_picture(head: bytes) -> bool:
    """Tell whether a file is a picture by its first 16 bytes or more. Nothing tells a TGA."""
    return _MAGIC.match(head) is not None


def decode(data: bytes, decoding: Decoding) -> Picture:
    """Decode one encoded picture and crop it; an animation gives its first frame.

    All files follow one colour rule: rotate by EXIF, scale 16 bits to 8, convert to sRGB by the embedded profile, lay
    transparency over white. No file makes Python warn.

    Args:
        data: The file.
        decoding: The part that is kept, and the largest that is decoded.

    Raises:
        RejectedImageError: The file cannot be decoded, or the crop does not fit.
    """
    try:
        pixels, notes = _upright(data, decoding.max_pixels)
        height, width = pixels.shape[:2]
        left, top, right, bottom = crop_box((width, height), decoding.crop)
        return Picture(height, width, notes, pixels[top:bottom, left:right])
    except RejectedImageError:
        raise
    except MemoryError:
        raise RejectedImageError("needs more memory than one picture may have") from None
    except Image.DecompressionBombError:
        raise RejectedImageError(f"exceeds limit of {_megapixels(decoding.max_pixels)}") from None
    except Exception as error:  # PIL's plugins raise nearly anything on damaged files
        text = re.sub(r" ?'?<_io\.BytesIO[^>]*>'?", "", " ".join(str(error).split()))
        raise RejectedImageError(text or type(error).__name__) from None


def _upright(data: bytes, max_pixels: int) -> tuple[np.ndarray, Note]:
    """RGB pixels of a whole picture."""
    # simplejpeg is the fast path; what it would treat otherwise than the colour rule goes through Pillow
    marks = None
    if simplejpeg is not None and simplejpeg.is_jpeg(data):
        marks = read_marks(data)
        if marks.info.get("icc_profile", b"") is None:
            marks = None  # it would refuse the file, since its profile is in disorder
        elif not marks.may_be_turned:
            height, width, space, _ = simplejpeg.decode_jpeg_header(data)
            _require_size(int(width), int(height), max_pixels)
            if space in ("YCbCr", "Gray"):
                return _fast_jpeg(data, marks.info, "L" if space == "Gray" else "RGB")
    _prepare_pillow(max_pixels)
    with Image.open(io.BytesIO(data), formats=FORMATS) as image:  # reads the header only
        _require_size(image.width, image.height, max_pixels)
        turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
        plain = image.mode in _PLAIN and "transparency" not in image.info
        if marks and image.mode in _PLAIN and not turned:
            return _fast_jpeg(data, marks.info, image.mode)
        image.load()
        sixteen = image.mode.startswith("I;16") or image.format in ("PNG", "PPM")  # their 16 bits may come as mode I
        rgb, notes = _to_rgb(ImageOps.exif_transpose(image) if turned else image, sixteen)
        return np.asarray(rgb), notes if plain and not turned else notes | Note.CONVERTED


def _fast_jpeg(data: bytes, info: Mapping[Any, Any], mode: str) -> tuple[np.ndarray, Note]:
    """RGB pixels of a JPEG of mode L or RGB that is not turned."""
    assert simplejpeg is not None
    transform, note = _profile_of(info, mode)
    if transform is None:
        return simplejpeg.decode_jpeg(data, "RGB", strict=True), note
    pixels = simplejpeg.decode_jpeg(data, "GRAY" if mode == "L" else "RGB", strict=True)
    return np.asarray(transform.apply(Image.fromarray(pixels.squeeze(2) if mode == "L" else pixels))), note


def _profile_of(info: Mapping[Any, Any], mode: str) -> tuple[ImageCms.ImageCmsTransform | None, Note]:
    """What brings the colours of an image to sRGB (None: nothing has to), by Pillow's notes on its file."""
    if "icc_profile" not in info:
        return None, Note(0)
    profile = info["icc_profile"]
    try:
        transform = conversion(profile if isinstance(profile, bytes) else b"", mode)  # Pillow: None where damaged
    except UnusableProfileError:
        return None, Note.PROFILE_IGNORED
    return transform, Note.PROFILE if transform else Note(0)


def _gamma_of(info: Mapping[Any, Any]) -> tuple[list[int] | None, Note]:
    """What brings the levels of a PNG that declares only a gamma to sRGB (None: nothing has to)."""
    # The PNG standard puts iCCP before sRGB before gAMA, and browsers follow a gAMA as well. cHRM is not followed: who
    # means other primaries than sRGB's embeds a profile.
    if "icc_profile" in info or "srgb" in info or not isinstance(info.get("gamma"), float):
        return None, Note(0)
    try:
        levels = gamma_table(info["gamma"])
    except UnusableProfileError:
        return None, Note.PROFILE_IGNORED
    return levels, Note.PROFILE if levels else Note(0)


def _prepare_pillow(max_pixels: int) -> None:
    """Silence Pillow's warnings, and make its own limit no tighter than ours. Both stay, for any thread."""
    # Pillow warns of damage that it survives. `warnings.catch_warnings` would race with threads that decode.
    if warnings.filters[:1] != [_QUIET]:
        warnings.filterwarnings("ignore", module=_OF_PILLOW)
    # It is not lifted altogether: it also bounds the tiles of a TIFF and the canvas of a WebP, which come before ours.
    if Image.MAX_IMAGE_PIXELS is not None and max_pixels > Image.MAX_IMAGE_PIXELS:
        Image.MAX_IMAGE_PIXELS = max_pixels


def _require_size(width: int, height: int, max_pixels: int) -> None:
    if width * height > max_pixels:
        raise RejectedImageError(f"declares {width}x{height}, over {_megapixels(max_pixels)}")


def _megapixels(limit: int) -> str:
    return f"{limit / 10**6:g} megapixels; --max-pixels sets the limit"


def crop_box(size: tuple[int, int], crop: str) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what `crop` keeps of a picture of (width, height).

    Raises RejectedImageError where `celeba` meets another size than CelebA's.
    """
    width, height = size
    if crop == "none":
        return 0, 0, width, height
    if crop == "celeba":
        if size != _CELEBA:
            raise RejectedImageError(f"{width}x{height}; the crop celeba takes the aligned images of 178x218")
        return _CELEBA_FACE
    side = min(width, height) if crop == "center" else min(width, height, int(crop))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def largest_side(crop: str) -> float:
    """The largest shorter side, in pixels, of what `crop` keeps of any picture."""
    left, _, right, _ = _CELEBA_FACE
    return int(crop) if crop.isdecimal() else right - left if crop == "celeba" else math.inf


def _to_rgb(image: Image.Image, sixteen: bool) -> tuple[Image.Image, Note]:
    """sRGB over white of any image; `sixteen`: its file has 16 bits."""
    info, notes, alpha = image.info, Note(0), None
    clear = info.get("transparency")
    if image.mode == "F" or image.mode.startswith("I"):
        values = np.asarray(image)
        if isinstance(clear, int):  # one grey level of a PNG is transparent
            alpha = Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8))
        reduced, notes = _eight_bits(values, sixteen)
        image = Image.fromarray(reduced)
    elif image.mode in _ALPHA or clear is not None:
        if isinstance(clear, tuple) and max(clear) > 255:  # Pillow reduces 16-bit RGB to 8, but not this colour of it
            info["transparency"] = tuple(value >> 8 for value in clear)
        grey = image.mode in ("L", "LA", "La")
        layers = image.convert("RGBA")
        alpha, image = layers.getchannel("A"), layers.getchannel("R") if grey else layers.convert("RGB")
    if image.mode not in ("L", "RGB", "CMYK", "LAB"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    transform, note = _profile_of(info, image.mode)
    rgb = transform.apply(image) if transform else image.convert("RGB")
    levels, of_gamma = _gamma_of(info)
    if levels is not None:
        rgb = rgb.point(levels * 3)
    if alpha is not None:
        white = Image.new("RGB", rgb.size, "white")
        white.paste(rgb, mask=alpha)
        rgb = white
    return rgb, notes | note | of_gamma


def _eight_bits(values: np.ndarray, sixteen: bool) -> tuple[np.ndarray, Note]:
    """Grey values of more than 8 bits as uint8; refuses ranges whose white nothing tells."""
    if not values.size:
        return values.astype(np.uint8), Note(0)
    if not np.isfinite(values).all():  # before minimum and maximum, which may warn of NaN
        raise RejectedImageError("float values with NaN or infinity; accepted: 0 to 1")
    low, high = values.min().item(), values.max().item()
    if values.dtype.kind == "f":
        if low < 0 or high > 1:
            raise RejectedImageError(f"float values from {low:g} to {high:g}; accepted: 0 to 1")
        return (values * 255).round().astype(np.uint8), Note(0)
    if low < 0 or high > 65535:
        raise RejectedImageError(f"integer values from {low} to {high}; accepted: 0 to 65535")
    # Pillow would clip 16-bit grey to white; 32-bit modes do not define their white, so the values decide
    if not sixteen and high <= 255:
        return values.astype(np.uint8), Note(0)
    return ((values.astype(np.uint32) + 128) // 257).astype(np.uint8), Note.FEW_BITS if 0 < high < 4096 else Note(0)
