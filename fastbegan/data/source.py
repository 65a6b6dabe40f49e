"""`--data` -> a packed set in the cache: made once, found again by what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ..errors import UserError
from ..files import atomic, make_folder
from . import faces
from .folder import Listing, RejectedImageError, check_crop, decode, list_images
from .pack import DamagedPackError, read_pack, write_pack

_CHUNK = 512

Progress = Callable[[str, int, int], None]
"""Called with what is being made, how many are done and how many there are."""


@dataclass(frozen=True)
class ImageSet:
    """A packed set: uint8 [count, size, size, 3] (a memory map), where it lies, and one line about it."""

    images: np.ndarray
    path: Path
    description: str


def cache_folder() -> Path:
    """Where packed sets are kept: FASTBEGAN_CACHE, else fastbegan/ in the user's cache folder."""
    if chosen := os.environ.get("FASTBEGAN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbegan"


def load_images(
    data: str, size: int, crop: str, progress: Progress, *, minimum: int = 1, max_bad: float = 1.0
) -> ImageSet:
    """The packed set for `data` (`faces`, `faces:COUNT` or a folder), packed now if it is not in the cache.

    Raises UserError for a folder that is missing, has fewer than `minimum` images or more than `max_bad` percent
    broken ones.
    """
    check_crop(crop)
    name, _, number = data.partition(":")
    if name == "faces" and not (number == "" and Path(data).is_dir()):
        count = _count(data, number)
        _require_enough(count, minimum, data)
        key = {"faces": count, "size": size}
        return _cached(key, size, f"{count:,} procedural portraits", lambda: _draw(count, size, progress))
    folder = Path(data)
    listing = list_images(folder)
    _require_enough(len(listing.images), minimum, data)
    key = {
        "folder": str(folder.resolve()),
        "crop": crop,
        "size": size,
        "files": _fingerprint(folder, listing),
    }
    found = _cached(
        key, size, f"images of {folder}", lambda: _decode_all(folder, listing, size, crop, progress, max_bad)
    )
    _require_enough(len(found.images), minimum, data)
    return found


def _count(data: str, number: str) -> int:
    if number == "" and data == "faces":
        return faces.DEFAULT_COUNT
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"data is {data!r}; accepted: 'faces', 'faces:COUNT' with COUNT from 1, or a folder of images")
    return int(number)


def _require_enough(count: int, minimum: int, data: str) -> None:
    if count < minimum:
        found = "no images" if count == 0 else f"only {count} images"
        raise UserError(f"data {data!r} has {found}; a batch needs {minimum}")


def _fingerprint(folder: Path, listing: Listing) -> str:
    digest = hashlib.sha256()
    for path in listing.images:
        status = (folder / path).stat()
        digest.update(f"{path}\0{status.st_size}\0{status.st_mtime_ns}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _cached(key: Mapping[str, object], size: int, what: str, make: Callable[[], Iterator[np.ndarray]]) -> ImageSet:
    text = json.dumps(key, sort_keys=True)
    path = cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.pack"
    if path.exists():
        try:
            images, header = read_pack(path)
            return ImageSet(images, path, f"{header.source}, {header.count:,} at {size} px")
        except DamagedPackError as error:
            warnings.warn(f"{error}; packing again", stacklevel=2)
    make_folder(path.parent)
    try:
        write_pack(path, make(), size, what)
    except OSError as error:
        raise UserError(f"the packed set {path} cannot be written ({error.strerror})") from None
    images, header = read_pack(path)
    return ImageSet(images, path, f"{header.source}, {header.count:,} at {size} px, packed now")


def _draw(count: int, size: int, progress: Progress) -> Iterator[np.ndarray]:
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        yield faces.faces(torch.arange(start, stop), size).numpy()
        progress("drawing portraits", stop, count)


def _decode_all(
    folder: Path, listing: Listing, size: int, crop: str, progress: Progress, max_bad: float
) -> Iterator[np.ndarray]:
    """Decoded images in listing order; ends with an error if too many files are broken, naming them in a file."""
    rejected = list(listing.rejected)

    def attempt(path: Path) -> np.ndarray | RejectedImageError:
        try:
            return decode(folder / path, size, crop)
        except RejectedImageError as error:
            return error

    total = len(listing.images)
    with ThreadPoolExecutor() as pool:
        for start in range(0, total, _CHUNK):
            paths = listing.images[start : start + _CHUNK]
            good = []
            for path, result in zip(paths, pool.map(attempt, paths), strict=True):
                if isinstance(result, RejectedImageError):
                    rejected.append((path, str(result)))
                else:
                    good.append(result)
            if good:
                yield np.stack(good)
            progress("packing images", start + len(paths), total)
    _report_rejected(folder, rejected, listing.others, total, max_bad)


def _report_rejected(
    folder: Path, rejected: list[tuple[Path, str]], others: list[Path], total: int, max_bad: float
) -> None:
    if not rejected and not others:
        return
    name = hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:20]
    report = cache_folder() / f"{name}.rejected.txt"
    lines = [f"{folder / path}\t{reason}" for path, reason in rejected]
    lines += [f"{folder / path}\tnot an image file by its name" for path in others]
    with atomic(report) as file:
        file.write(("\n".join(lines) + "\n").encode(errors="surrogateescape"))
    if not rejected:
        return
    first = "; ".join(f"{path}: {reason}" for path, reason in rejected[:3])
    message = f"{len(rejected)} of {total:,} images in {folder} are broken ({first}; all in {report})"
    if len(rejected) > max_bad / 100 * total:
        raise UserError(f"{message}; max_bad accepts {max_bad:g} percent: repair them, remove them or raise it")
    warnings.warn(f"{message}; left out", stacklevel=2)
