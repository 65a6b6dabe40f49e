"""Folders of pictures: which files there are, each once."""

from __future__ import annotations

import os
import stat
from dataclasses import dataclass, field
from pathlib import Path

from ..errors import UserError

SUFFIXES = frozenset((".bmp", ".gif", ".jfif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"))
CROPS = ("center", "none", "celeba")


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
    """Raises UserError unless `crop` is `center`, `none`, `celeba` or a number of pixels."""
    if crop not in CROPS and not (crop.isdecimal() and int(crop) > 0):
        raise UserError(f"crop is {crop!r}; accepted: {', '.join(CROPS)}, or a number of pixels")
