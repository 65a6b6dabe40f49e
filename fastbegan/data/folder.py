"""Folders of pictures: which files, and each file decoded to one square RGB image, or the reason why not."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..errors import UserError

SUFFIXES = frozenset((".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
MAX_PIXELS = 64_000_000  # a header that declares more is refused before anything is decoded


class RejectedImageError(Exception):
    """This file does not become an image; the message says why."""


@dataclass
class Listing:
    """Result of `list_images`: paths relative to the folder, sorted."""

    images: list[Path] = field(default_factory=list)
    rejected: list[tuple[Path, str]] = field(default_factory=list)
    others: list[Path] = field(default_factory=list)


def list_images(folder: Path) -> Listing:
    """All image files under `folder`, nested ones included. Raises UserError if it is no readable folder.

    Hidden files and folders are passed over. Links are followed; each folder and each file counts once however many
    links lead to it, so loops end.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"data {str(folder)!r} {kind}; accepted: 'faces', 'faces:COUNT' or a folder of images")
    listing, root = Listing(), folder.stat()
    seen = {(root.st_dev, root.st_ino)}
    waiting = [folder]
    while waiting:
        current = waiting.pop()
        try:
            entries = sorted(os.scandir(current), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"data folder {current} cannot be read ({error.strerror})") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            path = Path(entry.path)
            relative = path.relative_to(folder)
            try:
                status = entry.stat()
            except OSError as error:
                listing.rejected.append((relative, f"cannot be opened ({error.strerror})"))
                continue
            if (identity := (status.st_dev, status.st_ino)) in seen:
                continue
            seen.add(identity)
            if stat.S_ISDIR(status.st_mode):
                waiting.append(path)
            elif path.suffix.lower() not in SUFFIXES:
                listing.others.append(relative)
            elif not stat.S_ISREG(status.st_mode):
                listing.rejected.append((relative, "not a regular file"))  # opening a FIFO would wait for ever
            else:
                listing.images.append(relative)
    listing.images.sort()
    listing.rejected.sort()
    return listing


def check_crop(crop: str) -> None:
    """Raises UserError unless `crop` is `center`, `none` or a number of pixels."""
    if crop not in ("center", "none") and not (crop.isdecimal() and int(crop) > 0):
        raise UserError(f"crop is {crop!r}; accepted: center, none, or a number of pixels")


def decode(path: Path, size: int, crop: str) -> np.ndarray:
    """Decode, crop and scale (antialiased) one file: uint8 [size, size, 3]. Raises RejectedImageError.

    One colour rule for all files: EXIF rotation applied, 16-bit scaled, transparency over white, all to RGB.
    """
    try:
        with Image.open(path) as image:
            if image.width * image.height > MAX_PIXELS:
                raise RejectedImageError(
                    f"declares {image.width}x{image.height}, over {MAX_PIXELS // 10**6} megapixels"
                )
            image.load()
            upright = _to_rgb(ImageOps.exif_transpose(image))
            square = upright.crop(_crop_box(upright.size, crop))  # resize's own box lets pixels outside it in
            return np.asarray(square.resize((size, size), Image.Resampling.BILINEAR))
    except RejectedImageError:
        raise
    except Exception as error:  # PIL's plugins raise nearly anything on damaged files
        raise RejectedImageError(" ".join(str(error).split()) or type(error).__name__) from None


def _crop_box(size: tuple[int, int], crop: str) -> tuple[int, int, int, int]:
    width, height = size
    if crop == "none":
        return 0, 0, width, height
    side = min(width, height) if crop == "center" else min(width, height, int(crop))
    left, top = (width - side) // 2, (height - side) // 2
    return left, top, left + side, top + side


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        values = np.asarray(image, dtype=np.float64)
        # PIL's own conversion clips 16-bit grey to white; 32-bit modes do not say what their white is
        scale = 257.0 if image.mode.startswith("I;16") or values.max(initial=0) > 255 else 1.0
        image = Image.fromarray(np.clip(values / scale, 0, 255).round().astype(np.uint8))
    if "A" in image.mode or "a" in image.mode or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
