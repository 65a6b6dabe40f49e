"""`--data` -> a packed set, or the list of its good files: made once, found again by what they were made from."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import atomic, locked, make_folder
from .folder import check_crop
from .pack import OFFSET, DamagedPackError, Line, PackHeader, Part, leftovers, read_journal, read_pack, write_pack
from .source import Files, Source, find_source
from .workers import Request

_STALE_SECONDS = 86_400
_BROKEN, _CONVERTED = "\tbroken: ", "\tconverted"
_NAMED = 3  # broken files in a message

Progress = Callable[[str, int, int], None]
"""Called with what is being made, how many are done and how many there are."""


class NoRoomError(UserError):
    """The packed set would not fit on its disk."""


@dataclass(frozen=True)
class ImageSet:
    """A packed set: uint8 [count, size, size, 3] (a memory map), the checksum of its pixels, and one line about it.

    `contents` is the digest of the files, where they are files.
    """

    images: np.ndarray
    crc32: int
    description: str
    contents: str | None = None


@dataclass(frozen=True)
class Catalogue:
    """The files of a source that decode, in the order in which a pack holds them.

    `seen` is int64 [count, 3]: width, height, and whether colours or rotation have to be converted.
    """

    requests: list[Request]
    seen: np.ndarray
    broken: list[tuple[str, str]]
    description: str
    contents: str


def cache_folder() -> Path:
    """Where packed sets are kept: FASTBEGAN_CACHE, else fastbegan/ in the user's cache folder."""
    if chosen := os.environ.get("FASTBEGAN_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbegan"


def load_images(
    data: str,
    size: int,
    crop: str,
    progress: Progress,
    *,
    minimum: int = 1,
    max_bad: float = 1.0,
    workers: int | None = None,
) -> ImageSet:
    """The packed set for `data` (see `source.find_source`), packed now if it is not in the cache.

    Raises UserError for a source that is missing, has fewer than `minimum` images or more than `max_bad` percent
    broken ones.
    """
    check_crop(crop)
    if Path(data).suffix == ".pack" and Path(data).is_file():
        found = _given(Path(data), size)
    else:
        source = find_source(data)
        require_enough(source.total, minimum, data)
        key = hashlib.sha256(f"{source.made_from(crop)} {size}".encode()).hexdigest()[:20]
        path = cache_folder() / f"{key}.pack"
        found = make_pack(data, path, size, crop, progress, source=source, max_bad=max_bad, workers=workers)
    require_enough(len(found.images), minimum, data)
    return found


def make_pack(
    data: str,
    path: Path,
    size: int,
    crop: str,
    progress: Progress,
    *,
    source: Source | None = None,
    max_bad: float = 1.0,
    workers: int | None = None,
) -> ImageSet:
    """The packed set of `data` at `path`, made now unless it is there; what is broken is named in `rejected.txt`.

    Raises UserError for a bad source, too many broken files, no room, or where `path` holds images of another source.
    """
    check_crop(crop)
    source = find_source(data) if source is None else source
    require_enough(source.total, 1, data)
    made_from, report = source.made_from(crop), path.with_suffix(".rejected.txt")

    def ready() -> ImageSet | None:
        if not path.exists():
            return None
        try:
            images, header = read_pack(path)
        except DamagedPackError as error:
            if path.stat().st_size and path.parent != cache_folder():
                raise UserError(f"{error}; give another file for {source.description}, or remove it") from None
            warnings.warn(f"{error}; packing again", stacklevel=3)
            return None
        if header.source != source.description:
            raise UserError(f"{path} holds {header.source}; give another file for {source.description}, or remove it")
        if (header.made_from, header.size) != (made_from, size):
            warnings.warn(f"{path} was made of other files, another crop or size; packing again", stacklevel=3)
            return None
        return _image_set(images, header, report)

    if (found := ready()) is None:
        make_folder(path.parent)
        with locked(path, lambda: progress("waiting for another process that packs it", 0, source.total)):
            if (found := ready()) is None:  # by the one that was waited for
                _clear(path)
                _require_room(path, source.total, size)
                if isinstance(source, Files):  # what it says of them is there before the pack is
                    before = partial(_finish_files, data, source, crop, path)
                else:
                    before = partial(_finish, report)
                _write(source, path, size, crop, progress, max_bad, workers, before)
                images, header = read_pack(path, check_below=0)  # it was summed up while it was written
                found = _image_set(images, header, report, ", packed now")
    _judge(report, source.total, max_bad)
    return replace(found, contents=source.contents) if isinstance(source, Files) else found


def load_catalogue(
    data: str,
    crop: str,
    progress: Progress,
    *,
    max_bad: float = 1.0,
    workers: int | None = None,
    again: bool = False,
) -> Catalogue:
    """The good files of `data`: every one was decoded once, strictly; `again` for now, whatever the cache knows.

    Raises UserError for a source that is missing or is not made of files, and for more than `max_bad` percent broken.
    """
    check_crop(crop)
    source = find_source(data)
    if not isinstance(source, Files):
        raise UserError(f"data {data!r} is not made of picture files; accepted here: folders, .tar and .tfrecord files")
    made_from = source.made_from(crop)
    path = _catalogue_path(made_from)
    make_folder(path.parent)
    with locked(path, lambda: progress("waiting for another process that checks it", 0, source.total)):
        lines = [] if again else read_journal(path, made_from)
        if not lines or lines[-1].done < source.total:
            lines = []
            for part in _judged(source, source.parts(0, 8, crop, workers), progress, max_bad, [], "checking images"):
                lines.append(Line(part.done, 0, 0, part.files, part.broken))
            _write_catalogue(path, made_from, lines)
    files = [one for line in lines for one in line.files]
    broken = [*source.rejected, *(one for line in lines for one in line.broken)]
    _refuse_many(broken, source.total, source.total, max_bad)
    seen = np.array([one[1:] for one in files], dtype=np.int64).reshape(-1, 3)
    description = f"{source.description}, {len(files):,} of {source.total:,} good"
    return Catalogue([source.requests[entry] for entry, *_ in files], seen, broken, description, source.contents)


def _catalogue_path(made_from: str) -> Path:
    return cache_folder() / f"{made_from}.files.jsonl"


def _write_catalogue(path: Path, made_from: str, lines: list[Line]) -> None:
    make_folder(path.parent)
    with atomic(path) as file:
        for value in (made_from, *map(vars, lines)):
            file.write((json.dumps(value) + "\n").encode())


def _given(path: Path, size: int) -> ImageSet:
    try:
        images, header = read_pack(path)
    except DamagedPackError as error:
        raise UserError(f"{error}; make it again with: fastbegan data pack") from None
    if header.size != size:
        raise UserError(f"{path} holds images of {header.size} px; {size} are wanted: pack them with --size {size}")
    return _image_set(images, header, path.with_suffix(".rejected.txt"))


def _image_set(images: np.ndarray, header: PackHeader, report: Path, more: str = "") -> ImageSet:
    lines = _read_report(report)
    converted = sum(line.endswith(_CONVERTED) for line in lines)
    more = (f", {converted:,} of them converted" if converted else "") + more
    return ImageSet(images, header.crc32, f"{header.source}, {header.count:,} at {header.size} px{more}")


def require_enough(count: int, minimum: int, data: str) -> None:
    """Raises UserError where there are fewer images than a batch needs."""
    if count < minimum:
        found = "no images" if count == 0 else f"only {count} images"
        raise UserError(f"data {data!r} has {found}; a batch needs {minimum}")


def _require_room(path: Path, total: int, size: int) -> None:
    wanted, begun = OFFSET + total * size * size * 3, leftovers(path)[0]
    there = begun.stat().st_size if begun.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if wanted - there > free:
        raise NoRoomError(
            f"{path} would take {wanted / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free there; make room, or set "
            f"FASTBEGAN_CACHE to a folder with room"
        )


def _finish_files(data: str, source: Files, crop: str, path: Path, lines: list[Line]) -> None:
    """Before a pack of files appears: they are still the same, and what was broken or converted is written down."""
    made_from = source.made_from(crop)
    if find_source(data).made_from(crop) != made_from:
        for left in leftovers(path):
            left.unlink(missing_ok=True)
        raise UserError(f"{source.description} changed while they were packed; pack them when nobody writes there")
    _write_report(path.with_suffix(".rejected.txt"), source, lines)
    _write_catalogue(_catalogue_path(made_from), made_from, lines)


def _finish(report: Path, _: list[Line]) -> None:
    report.unlink(missing_ok=True)  # of files that were packed here before


def _clear(path: Path) -> None:
    """What processes that were killed while packing left of other sets, after a day."""
    mine = leftovers(path)
    for stale in (*path.parent.glob(".*.pack.partial"), *path.parent.glob(".*.pack.journal")):
        if stale not in mine and time.time() - stale.stat().st_mtime > _STALE_SECONDS:
            stale.unlink(missing_ok=True)


def _write(
    source: Source, path: Path, size: int, crop: str, progress: Progress, max_bad: float, workers: int | None,
    before: Callable[[list[Line]], None],
) -> None:  # fmt: skip
    made_from = source.made_from(crop)
    journal = read_journal(leftovers(path)[1], made_from)  # before it is begun anew

    def parts(start: int) -> Iterator[Part]:
        taken_up = [one for line in journal if line.done <= start for one in line.broken]
        return _judged(source, source.parts(start, size, crop, workers), progress, max_bad, taken_up, source.doing)

    try:
        write_pack(path, parts, size=size, source=source.description, made_from=made_from, before=before)
    except OSError as error:
        raise UserError(f"the packed set {path} cannot be written ({error.strerror})") from None


def _judged(
    source: Source, parts: Iterator[Part], progress: Progress, max_bad: float, before: list[tuple[str, str]], doing: str
) -> Iterator[Part]:
    """The parts, as long as few enough are broken; raises UserError as soon as there are too many."""
    broken = [*(source.rejected if isinstance(source, Files) else []), *before]
    for part in parts:
        broken += part.broken
        _refuse_many(broken, part.done, source.total, max_bad)
        yield part
        progress(doing, part.done, source.total)


def _refuse_many(broken: list[tuple[str, str]], done: int, total: int, max_bad: float) -> None:
    if len(broken) > max_bad / 100 * total:
        raise UserError(
            f"{_broken_words([f'{name}: {reason}' for name, reason in broken], done, total)}; max_bad accepts "
            f"{max_bad:g} percent: repair them, remove them or raise it (fastbegan data check names all)"
        )


def _broken_words(broken: list[str], done: int, total: int) -> str:
    where = f"{total:,} images" if done >= total else f"the first {done:,} of {total:,} images"
    more = "; ..." if len(broken) > _NAMED else ""
    return f"{len(broken)} of {where} are broken ({'; '.join(broken[:_NAMED])}{more})"


def _write_report(report: Path, source: Files, lines: list[Line]) -> None:
    broken = [*source.rejected, *(one for line in lines for one in line.broken)]
    text = [f"{name}{_BROKEN}{reason}" for name, reason in broken]
    text += [f"{name}\tleft out: not an image file by its name" for name in source.others]
    text += [f"{source.names[entry]}{_CONVERTED}" for line in lines for entry, *_, converted in line.files if converted]
    with atomic(report) as file:
        file.write("".join(line + "\n" for line in text).encode(errors="surrogateescape"))


def _read_report(report: Path) -> list[str]:
    return report.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if report.exists() else []


def _judge(report: Path, total: int, max_bad: float) -> None:
    """Raises UserError if `report` names too many broken files, warns if it names some."""
    broken = [
        (name, reason) for line in _read_report(report) for name, mark, reason in [line.partition(_BROKEN)] if mark
    ]
    _refuse_many(broken, total, total, max_bad)
    if broken:
        words = _broken_words([f"{name}: {reason}" for name, reason in broken], total, total)
        warnings.warn(f"{words}; left out, all named in {report}", stacklevel=3)
