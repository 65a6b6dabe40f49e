"""One picture file to RGB pixels, or the reason for refusing it. No torch here: worker processes import this."""

from __future__ import annotations

import enum
import io
import os
import re
import stat
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError

try:
    import simplejpeg
except ImportError:  # no wheel for this platform: PIL decodes JPEG too, more slowly
    simplejpeg = None

CROPS = ("center", "none", "celeba")
VERSION = 2  # to be raised whenever the same file gives other pixels
MAX_PIXELS = 64_000_000  # a header that declares more is refused before decoding
MAX_BYTES = 256 << 20  # of a file
_CELEBA = (178, 218)  # the aligned and cropped images of CelebA ...
_CELEBA_FACE = (25, 50, 153, 178)  # ... and the square of 128 pixels around the face
_ORIENTATION = 0x0112
_EXIF_WITHIN = 1 << 17  # bytes: the segments that may hold an orientation lie in here
_ORIENTED = (b"Exif\0", b"Orientation")  # marks of an orientation, in EXIF or XMP
_ALPHA = frozenset(("LA", "La", "PA", "RGBA", "RGBa"))
_PLAIN = frozenset(("L", "RGB"))


@dataclass(frozen=True)
class Decoding:
    """What to make of picture files: the part that is kept, and the largest that is decoded."""

    crop: str = "center"
    """`center` (largest square), `none` (stretched), `celeba`, or a number of pixels."""
    max_pixels: int = MAX_PIXELS
    """A header that declares more is refused before decoding."""

    def __post_init__(self) -> None:
        if self.crop not in CROPS and not (self.crop.isdecimal() and int(self.crop) > 0):
            raise UserError(f"crop is {self.crop!r}; accepted: {', '.join(CROPS)}, or a number of pixels")
        if self.max_pixels < 1:
            raise UserError(f"max_pixels is {self.max_pixels}; accepted: whole numbers from 1")


class RejectedImageError(Exception):
    """The file cannot be decoded; the message is the reason."""


class Note(enum.IntFlag):
    """What the decoder did to a picture, or noticed, that its owner should know. Packs and reports keep the numbers."""

    CONVERTED = 1
    """Rotated, or brought to 8-bit RGB from another mode."""
    PROFILE = 2
    PROFILE_IGNORED = 4
    FEW_BITS = 8


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


def decode(data: bytes, decoding: Decoding) -> Picture:
    """Decode one encoded picture and crop it.

    All files follow one colour rule: rotate by EXIF, scale 16 bits to 8, lay transparency over white, convert to RGB.
    Raises RejectedImageError.
    """
    try:
        pixels, notes = _upright(data)
        height, width = pixels.shape[:2]
        left, top, right, bottom = crop_box((width, height), decoding.crop)
        return Picture(height, width, notes, pixels[top:bottom, left:right])
    except RejectedImageError:
        raise
    except MemoryError:
        raise RejectedImageError("needs more memory than one picture may have") from None
    except Exception as error:  # PIL's plugins raise nearly anything on damaged files
        text = re.sub(r" ?'?<_io\.BytesIO[^>]*>'?", "", " ".join(str(error).split()))
        raise RejectedImageError(text or type(error).__name__) from None


def _upright(data: bytes) -> tuple[np.ndarray, Note]:
    """RGB pixels of a whole picture."""
    # simplejpeg is the fast path; what it would treat otherwise than the colour rule goes through Pillow
    head = data[:_EXIF_WITHIN]
    if simplejpeg is not None and simplejpeg.is_jpeg(data) and not any(mark in head for mark in _ORIENTED):
        height, width, space, _ = simplejpeg.decode_jpeg_header(data)
        _require_size(int(width), int(height))
        if space in ("YCbCr", "Gray"):
            return simplejpeg.decode_jpeg(data, "RGB", strict=True), Note(0)
    with Image.open(io.BytesIO(data)) as image:  # reads the header only
        _require_size(image.width, image.height)
        turned = image.getexif().get(_ORIENTATION, 1) not in (0, 1)
        plain = image.mode in _PLAIN and "transparency" not in image.info
        if simplejpeg is not None and image.format == "JPEG" and image.mode in _PLAIN and not turned:
            return simplejpeg.decode_jpeg(data, "RGB", strict=True), Note(0)
        image.load()
        upright = ImageOps.exif_transpose(image) if turned else image
        return np.asarray(_to_rgb(upright)), Note.CONVERTED if turned or not plain else Note(0)


def _require_size(width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise RejectedImageError(f"declares {width}x{height}, over {MAX_PIXELS // 10**6} megapixels")


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


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float32)
        # Pillow would clip 16-bit grey to white; 32-bit modes do not define their white, so the values decide
        scale = 257.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.clip(values / scale, 0, 255).round().astype(np.uint8))
    if image.mode in _ALPHA or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGB", image.size, "white")
        white.paste(image, mask=image.getchannel("A"))
        return white
    return image.convert("RGB")


SUFFIXES = frozenset(
    ".apng .avif .avifs .bmp .dib .gif .j2k .jfif .jp2 .jpc .jpe .jpeg .jpg .jpx .pbm .pgm .png .pnm .ppm .qoi .tga "
    ".tif .tiff .webp".split()
)


def is_picture(head: bytes) -> bool:
    return head.startswith((b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*", b"MM", b"P6")) or head[8:12] == b"WEBP"
