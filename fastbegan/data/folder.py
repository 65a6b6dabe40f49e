"""Folders of pictures: which files there are, each once."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError

SUFFIXES = frozenset((".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
CROPS = ("center", "none", "celeba")


class Found(NamedTuple):
    """An image file: its path, bytes, and time of last change in nanoseconds."""

    path: str
    size: int
    time: int


@dataclass
class Listing:
    """Result of `list_images`: paths relative to the folder, sorted."""

    images: list[Found] = field(default_factory=list)
    rejected: list[tuple[str, str]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)


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
    waiting = [""]  # strings, not paths: there may be a million
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
            if (identity := (status.st_dev, status.st_ino)) in seen:
                continue
            if status.st_ino:  # Windows tells none
                seen.add(identity)
            if stat.S_ISDIR(status.st_mode):
                waiting.append(relative)
            elif not _is_image(entry.name):
                listing.others.append(relative)
            elif not stat.S_ISREG(status.st_mode):
                listing.rejected.append((relative, "not a regular file"))  # opening a FIFO would wait for ever
            else:
                listing.images.append(Found(relative, status.st_size, status.st_mtime_ns))
    listing.images.sort()
    listing.rejected.sort()
    return listing


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in SUFFIXES  # noqa: PTH122


def check_crop(crop: str) -> None:
    """Raises UserError unless `crop` is `center`, `none`, `celeba` or a number of pixels."""
    if crop not in CROPS and not (crop.isdecimal() and int(crop) > 0):
        raise UserError(f"crop is {crop!r}; accepted: {', '.join(CROPS)}, or a number of pixels")
