"""`--data` -> a packed set in the cache: made once, found again by what it was made from."""

from __future__ import annotations

import hashlib
import json
import os
import time
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

DECODE_VERSION = 1  # counts up when the same files give other pixels
_CHUNK = 512
_STALE_SECONDS = 86_400
_BROKEN = "\tbroken: "

Progress = Callable[[str, int, int], None]
"""Called with what is being made, how many are done and how many there are."""


@dataclass(frozen=True)
class ImageSet:
    """A packed set: uint8 [count, size, size, 3] (a memory map), the checksum of its pixels, and one line about it."""

    images: np.ndarray
    crc32: int
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
    if not is_folder(data):
        count = _count(data)
        _require_enough(count, minimum, data)
        key = {"faces": count, "size": size, "version": faces.VERSION}
        found = _cached(_path(key), f"{count:,} procedural portraits", size, lambda: _draw(count, size, progress))
    else:
        folder = Path(data).resolve()
        listing = list_images(folder)
        _require_enough(len(listing.images), minimum, data)
        key = {"folder": _fingerprint(folder, listing), "crop": crop, "size": size, "version": DECODE_VERSION}
        path = _path(key)
        report = path.with_suffix(".rejected.txt")
        found = _cached(
            path,
            f"images of {folder}",
            size,
            lambda: _decode_all(folder, listing, size, crop, progress, report, max_bad),
        )
        _judge_rejected(report, len(listing.images), max_bad)
    _require_enough(len(found.images), minimum, data)
    return found


def is_folder(data: str) -> bool:
    """Whether `data` names a folder and not the procedural portraits; a folder called faces is ./faces."""
    return data.partition(":")[0] != "faces"


def _count(data: str) -> int:
    number = data.removeprefix("faces").removeprefix(":")
    if data == "faces":
        return faces.DEFAULT_COUNT
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"data is {data!r}; accepted: 'faces', 'faces:COUNT' with COUNT from 1, or a folder of images")
    return int(number)


def _require_enough(count: int, minimum: int, data: str) -> None:
    if count < minimum:
        found = "no images" if count == 0 else f"only {count} images"
        raise UserError(f"data {data!r} has {found}; a batch needs {minimum}")


def _fingerprint(folder: Path, listing: Listing) -> str:
    digest = hashlib.sha256(os.fsencode(folder))
    for path in listing.images:
        status = (folder / path).stat()
        digest.update(os.fsencode(path) + f"\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    for path, reason in listing.rejected:
        digest.update(os.fsencode(path) + f"\0{reason}\n".encode())
    return digest.hexdigest()


def _path(key: Mapping[str, object]) -> Path:
    text = json.dumps(key, sort_keys=True)
    return cache_folder() / f"{hashlib.sha256(text.encode()).hexdigest()[:20]}.pack"


def _cached(path: Path, what: str, size: int, make: Callable[[], Iterator[np.ndarray]]) -> ImageSet:
    if path.exists():
        try:
            images, header = read_pack(path)
            return ImageSet(images, header.crc32, f"{header.source}, {header.count:,} at {size} px")
        except DamagedPackError as error:
            warnings.warn(f"{error}; packing again", stacklevel=2)
    make_folder(path.parent)
    for stale in path.parent.glob(f".{path.name}.*"):  # of a process that was killed while packing
        if time.time() - stale.stat().st_mtime > _STALE_SECONDS:
            stale.unlink(missing_ok=True)
    try:
        write_pack(path, make(), size, what)
    except OSError as error:
        raise UserError(f"the packed set {path} cannot be written ({error.strerror})") from None
    images, header = read_pack(path)
    return ImageSet(images, header.crc32, f"{header.source}, {header.count:,} at {size} px, packed now")


def _draw(count: int, size: int, progress: Progress) -> Iterator[np.ndarray]:
    for start in range(0, count, _CHUNK):
        stop = min(start + _CHUNK, count)
        yield faces.faces(torch.arange(start, stop), size).numpy()
        progress("drawing portraits", stop, count)


def _decode_all(
    folder: Path, listing: Listing, size: int, crop: str, progress: Progress, report: Path, max_bad: float
) -> Iterator[np.ndarray]:
    """Decoded images in listing order; names the broken ones in `report`. Raises UserError if there are too many."""
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
    lines = [f"{folder / path}{_BROKEN}{reason}" for path, reason in rejected]
    lines += [f"{folder / path}\tleft out: not an image file by its name" for path in listing.others]
    with atomic(report) as file:
        file.write("".join(line + "\n" for line in lines).encode(errors="surrogateescape"))
    _judge_rejected(report, total, max_bad, warn=False)


def _judge_rejected(report: Path, total: int, max_bad: float, *, warn: bool = True) -> None:
    """Raises UserError if `report` names too many broken files, warns if it names some."""
    lines = report.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if report.exists() else []
    broken = [line.replace(_BROKEN, ": ") for line in lines if _BROKEN in line]
    if not broken:
        return
    message = f"{len(broken)} of {total:,} images are broken ({'; '.join(broken[:3])}; all of them in {report})"
    if len(broken) > max_bad / 100 * total:
        raise UserError(f"{message}; max_bad accepts {max_bad:g} percent: repair them, remove them or raise it")
    if warn:
        warnings.warn(f"{message}; left out", stacklevel=2)
