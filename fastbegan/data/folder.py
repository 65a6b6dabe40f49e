"""The image files of a folder, each listed once."""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..errors import UserError
from .decode import SUFFIXES, RejectedImageError, is_picture, read_bytes

FIRST_BYTES = 32  # tell a picture
# Not opened to look whether it is a picture: what stands beside pictures by the million, and photographs in formats
# whose first bytes are those of a TIFF or an AVIF.
_NEVER = frozenset(
    ".cls .csv .gz .html .json .jsonl .lock .log .md .mdb .npy .npz .parquet .pickle .pkl .pt .py .tar .tfrecord .tsv "
    ".txt .xml .yaml .yml .zip "
    ".3fr .arw .cr2 .cr3 .dng .erf .heic .heif .hif .kdc .mrw .ndpi .nef .nrw .orf .pef .raf .raw .rw2 .srw .svs .x3f"
    "".split()
)
TARS = (".tar", ".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz")
HIDDEN, ARCHIVES, AGAIN = "hidden", "archives that are not read", "links to what is taken already"
_RECORDS = re.compile(r"\.tfrecords?(-\d+-of-\d+)?$")


class ImageFile(NamedTuple):
    """An image file as the folder lists it."""

    path: str
    """Relative to the folder."""
    size: int
    """Bytes."""
    time: int
    """Last change, in nanoseconds."""
    reason: str = ""
    """The reason why it cannot be read, where that is known."""


class LeftOut(NamedTuple):
    """Something in a source that is not taken, and is not broken."""

    name: str
    kind: str
    """What it is, in words: `.txt`, `links in an archive`."""


@dataclass
class Listing:
    """The result of `list_images`; paths are relative to the folder."""

    images: list[ImageFile] = field(default_factory=list)
    """Sorted by path."""
    others: list[ImageFile] = field(default_factory=list)
    """Files that are no images, sorted by path."""
    met: list[LeftOut] = field(default_factory=list)
    """Hidden files and folders, into which nobody looked, and links to what was met before."""

    def left_out(self, folder: Path) -> list[LeftOut]:
        """Everything but the images, with whole paths."""
        kinds = [LeftOut(file.path, kind_of(file.path)) for file in self.others]
        return [LeftOut(f"{folder}{os.sep}{name}", kind) for name, kind in (*kinds, *self.met)]


def list_images(folder: Path) -> Listing:
    """List all image files under `folder` and its subfolders; skip hidden files and folders.

    A file is an image by its suffix, or by its first bytes where the suffix says nothing. Links are followed. Each file
    and folder counts once, by device and inode, so loops of links end. Raises UserError where a folder cannot be read.
    """
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
            relative = os.path.join(current, entry.name)  # noqa: PTH118
            if entry.name.startswith("."):
                listing.met.append(LeftOut(relative, HIDDEN))
                continue
            try:
                status = entry.stat()
            except OSError as error:
                file = ImageFile(relative, 0, 0, f"cannot be opened ({error.strerror})")
                (listing.images if suffix_of(entry.name) in SUFFIXES else listing.others).append(file)
                continue
            if (identity := (status.st_dev, status.st_ino)) in visited:
                listing.met.append(LeftOut(relative, AGAIN))
                continue
            if status.st_ino:  # Windows reports 0
                visited.add(identity)
            if stat.S_ISDIR(status.st_mode):
                waiting.append(relative)
                continue
            # opening a FIFO would block
            reason = "" if stat.S_ISREG(status.st_mode) else "not a regular file"
            file = ImageFile(relative, status.st_size, status.st_mtime_ns, reason)
            (listing.images if _is_image(folder, file) else listing.others).append(file)
    listing.images.sort()
    listing.others.sort()
    return listing


def _is_image(folder: Path, file: ImageFile) -> bool:
    def head() -> bytes:
        try:
            return b"" if file.reason else read_bytes(folder / file.path, 0, FIRST_BYTES)
        except RejectedImageError:
            return b""

    return is_image(file.path, head)


def is_image(name: str, head: Callable[[], bytes]) -> bool:
    """Whether a file is an image: by its suffix, or by its first bytes, which `head` reads, where that says nothing."""
    suffix = suffix_of(name)
    return suffix in SUFFIXES or (suffix not in _NEVER and is_picture(head()))


def suffix_of(name: str) -> str:
    """The suffix of a file's name, with its dot and in lower case."""
    return os.path.splitext(name)[1].lower()  # noqa: PTH122


def kind_of(name: str) -> str:
    """The kind under which a file that is no image is counted."""
    return ARCHIVES if is_archive(name) else suffix_of(name) or "without a suffix"


def is_archive(name: str) -> bool:
    """Whether a file of this name may hold pictures."""
    name = name.lower()
    return name.endswith((*TARS, ".zip", ".parquet")) or _RECORDS.search(name) is not None
