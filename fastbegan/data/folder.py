"""The image files of a folder, each listed once."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

SUFFIXES = frozenset((".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
CROPS = ("center", "none", "celeba")


class ImageFile(NamedTuple):
    """An image file as the folder lists it."""

    path: str
    """Relative to the folder."""
    size: int
    """Bytes."""
    time: int
    """Last change, in nanoseconds."""


@dataclass
class Listing:
    """The result of `list_images`; paths are relative to the folder."""

    images: list[ImageFile] = field(default_factory=list)
    """Sorted by path."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    """Image files that cannot be read: path and reason, sorted."""
    others: list[str] = field(default_factory=list)
    """Files whose suffix is not that of an image."""


def list_images(folder: Path) -> Listing:
    """List all image files under `folder` and its subfolders; skip hidden files and folders.

    Links are followed. Each file and folder counts once, by device and inode, so loops of links end. Raises UserError
    where `folder` is not a readable folder.
    """
    if not folder.is_dir():
        kind = "is a file" if folder.exists() else "does not exist"
        raise UserError(f"data {str(folder)!r} {kind}; accepted: 'faces', 'faces:COUNT' or a folder of images")
    listing, root = Listing(), folder.stat()
    visited = {(root.st_dev, root.st_ino)}
    waiting = [""]  # strings are cheaper than Path objects: there may be a million files
    while waiting:
        current = waiting.pop()
        try:
            entries = sorted(os.scandir(folder / current), key=lambda entry: entry.name)
        except OSError as error:
            raise UserError(f"data folder {folder / current} cannot be read ({error.strerror})") from None
        for entry in entries:
            if entry.name.startswith("."):
                continue
            relative = os.path.join(current, entry.name)  # noqa: PTH118
            try:
                status = entry.stat()
            except OSError as error:
                if _is_image(entry.name):
                    listing.rejected.append((relative, f"cannot be opened ({error.strerror})"))
                else:
                    listing.others.append(relative)
                continue
            if (identity := (status.st_dev, status.st_ino)) in visited:
                continue
            if status.st_ino:  # Windows reports 0
                visited.add(identity)
            if stat.S_ISDIR(status.st_mode):
                waiting.append(relative)
            elif not _is_image(entry.name):
                listing.others.append(relative)
            elif not stat.S_ISREG(status.st_mode):
                listing.rejected.append((relative, "not a regular file"))  # opening a FIFO would block
            else:
                listing.images.append(ImageFile(relative, status.st_size, status.st_mtime_ns))
    listing.images.sort()
    listing.rejected.sort()
    return listing


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def check_crop(crop: str) -> None:
    """Raises UserError unless `crop` is `center`, `none`, `celeba` or a number of pixels."""
    if crop not in CROPS and not (crop.isdecimal() and int(crop) > 0):
        raise UserError(f"crop is {crop!r}; accepted: {', '.join(CROPS)}, or a number of pixels")
