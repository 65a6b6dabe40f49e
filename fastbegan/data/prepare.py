"""`--data` to a packed set, or to the list of its good files: made once, then found in the cache by their hash."""

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
from .decode import Note
from .folder import check_crop
from .pack import OFFSET, DamagedPackError, Line, PackHeader, Part, leftovers, read_journal, read_pack, write_pack
from .source import Files, Source, find_source
from .workers import Request

_STALE_SECONDS = 86_400  # after that long, leftovers of a killed process are removed
_BROKEN, _CONVERTED = "\tbroken: ", "\tconverted"  # follow a file's name in rejected.txt
_NAMED = 3  # broken files that a message names

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the number of entries done, and their total."""


_Accept = Callable[[Iterator[Part], list[tuple[str, str]], str], Iterator[Part]]
_Finish = Callable[[list[Line]], None]


class NoRoomError(UserError):
    """The packed set would not fit on its disk."""


@dataclass(frozen=True)
class ImageSet:
    """A packed set."""

    images: np.ndarray
    """A memory map: uint8 [count, size, size, 3]."""
    crc32: int
    """Checksum of all pixels."""
    description: str
    """One line about it."""
    contents: str | None = None
    """Digest of the files' names and lengths; None where the source has no files."""


@dataclass(frozen=True)
class Catalogue:
    """The files of a source that can be decoded, in the order of a pack."""

    requests: list[Request]
    seen: np.ndarray
    """int64 [count, 3]: width, height and `decode.Note`."""
    broken: list[tuple[str, str]]
    """Name and reason of every other file."""
    description: str
    contents: str
    """Digest of the files' names and lengths."""


def cache_folder() -> Path:
    """The folder of packed sets: FASTBEGAN_CACHE, else fastbegan/ in the user's cache folder."""
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
    """Load the packed set of `data` from the cache; pack it first where it is not there.

    Args:
        data: The source, as `source.find_source` takes it, or a pack.
        size: Height and width of the packed images, in pixels.
        crop: `center`, `none`, `celeba`, or a number of pixels.
        progress: Called while images are packed.
        minimum: Images that the caller needs.
        max_bad: Percentage of broken files up to which they are left out.
        workers: Processes that decode; None means one per core.

    Raises:
        UserError: The source is missing, has too few images or too many broken files, or does not fit on the disk.
    """
    check_crop(crop)
    if Path(data).suffix == ".pack" and Path(data).is_file():
        image_set = _open_pack(Path(data), size)
    else:
        source = find_source(data)
        require_enough(source.total, minimum, data)
        key = hashlib.sha256(f"{source.made_from(crop)} {size}".encode()).hexdigest()[:20]
        path = cache_folder() / f"{key}.pack"
        image_set = make_pack(data, path, size, crop, progress, source=source, max_bad=max_bad, workers=workers)
    require_enough(len(image_set.images), minimum, data)
    return image_set


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
    """Make the pack of `data` at `path`, unless it is there; NAME.rejected.txt beside it lists the broken files.

    Args:
        data: The source, as `source.find_source` takes it.
        path: The file, NAME.pack.
        size: Height and width of the packed images, in pixels.
        crop: `center`, `none`, `celeba`, or a number of pixels.
        progress: Called while images are packed.
        source: The source of `data`, where the caller has opened it.
        max_bad: Percentage of broken files up to which they are left out.
        workers: Processes that decode; None means one per core.

    Raises:
        UserError: The source is bad, has too many broken files, does not fit on the disk, or `path` holds another
            source's images.
    """
    check_crop(crop)
    source = find_source(data) if source is None else source
    require_enough(source.total, 1, data)
    made_from, report = source.made_from(crop), path.with_suffix(".rejected.txt")

    def existing() -> ImageSet | None:
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

    if (image_set := existing()) is None:
        make_folder(path.parent)
        with locked(path, lambda: progress("waiting for another process that packs it", 0, source.total)):
            if (image_set := existing()) is None:  # else the process that held the lock has made it
                _remove_stale(path)
                _require_room(path, source.total, size)
                # rejected.txt has to be there before the pack appears
                finish = partial(_finish_files, data, source, crop) if isinstance(source, Files) else _finish
                accept = partial(_few_broken, source, progress, max_bad)
                _write(source, path, size, crop, workers, accept, partial(finish, path))
                images, header = read_pack(path, check_below=0)  # the checksum was computed while writing
                image_set = _image_set(images, header, report, ", packed now")
    _check_report(report, source.total, max_bad)
    return replace(image_set, contents=source.contents) if isinstance(source, Files) else image_set


def load_catalogue(
    data: str,
    crop: str,
    progress: Progress,
    *,
    max_bad: float = 1.0,
    workers: int | None = None,
    again: bool = False,
) -> Catalogue:
    """List the good files of `data`: each was decoded strictly once, now or for the cache.

    Args:
        data: The source, as `source.find_source` takes it.
        crop: `center`, `none`, `celeba`, or a number of pixels.
        progress: Called while files are checked.
        max_bad: Percentage of broken files up to which they are left out.
        workers: Processes that decode; None means one per core.
        again: Decode all files now, whatever the cache holds.

    Raises:
        UserError: The source is missing, is not made of files, or has too many broken ones.
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
            parts = source.parts(0, 8, crop, workers)  # 8 px: only whether they decode matters
            for part in _few_broken(source, progress, max_bad, parts, [], "checking images"):
                lines.append(Line(part.done, 0, 0, part.files, part.broken))
            _write_catalogue(path, made_from, lines)
    files = [file for line in lines for file in line.files]
    broken = _all_broken(source, lines)
    _require_few_broken(broken, source.total, source.total, max_bad)
    seen = np.array([file[1:] for file in files], dtype=np.int64).reshape(-1, 3)
    description = f"{source.description}, {len(files):,} of {source.total:,} good"
    return Catalogue([source.requests[entry] for entry, *_ in files], seen, broken, description, source.contents)


def _catalogue_path(made_from: str) -> Path:
    return cache_folder() / f"{made_from}.files.jsonl"


def _write_catalogue(path: Path, made_from: str, lines: list[Line]) -> None:
    make_folder(path.parent)
    with atomic(path) as file:
        for value in (made_from, *map(vars, lines)):
            file.write((json.dumps(value) + "\n").encode())


def _all_broken(source: Files, lines: list[Line]) -> list[tuple[str, str]]:
    return [*source.rejected, *(entry for line in lines for entry in line.broken)]


def _open_pack(path: Path, size: int) -> ImageSet:
    """A pack that the user names as data."""
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
        images = "no images" if count == 0 else f"only {count} images"
        raise UserError(f"data {data!r} has {images}; a batch needs {minimum}")


def _require_room(path: Path, total: int, size: int) -> None:
    needed, unfinished = OFFSET + total * size * size * 3, leftovers(path)[0]
    written = unfinished.stat().st_size if unfinished.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if needed - written > free:
        raise NoRoomError(
            f"{path} would take {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free there; make room, or set "
            f"FASTBEGAN_CACHE to a folder with room"
        )


def _finish_files(data: str, source: Files, crop: str, path: Path, lines: list[Line]) -> None:
    """Before a pack of files appears: check that they have not changed, and write report and catalogue."""
    made_from = source.made_from(crop)
    if find_source(data).made_from(crop) != made_from:
        for leftover in leftovers(path):
            leftover.unlink(missing_ok=True)
        raise UserError(f"{source.description} changed while they were packed; pack them when nobody writes there")
    _write_report(path.with_suffix(".rejected.txt"), source, lines)
    _write_catalogue(_catalogue_path(made_from), made_from, lines)


def _finish(path: Path, _: list[Line]) -> None:
    path.with_suffix(".rejected.txt").unlink(missing_ok=True)  # an earlier pack of files may have left it


def _remove_stale(path: Path) -> None:
    """Remove leftovers of other packs in the folder of `path` that no process has written to for a day."""
    resumable = leftovers(path)
    for stale in (*path.parent.glob(".*.pack.partial"), *path.parent.glob(".*.pack.journal")):
        if stale not in resumable and time.time() - stale.stat().st_mtime > _STALE_SECONDS:
            stale.unlink(missing_ok=True)


def _write(
    source: Source, path: Path, size: int, crop: str, workers: int | None, accept: _Accept, finish: _Finish
) -> None:
    made_from = source.made_from(crop)
    journal = read_journal(leftovers(path)[1], made_from)  # write_pack starts the file anew

    def parts(start: int) -> Iterator[Part]:
        broken = [entry for line in journal if line.done <= start for entry in line.broken]
        return accept(source.parts(start, size, crop, workers), broken, source.doing)

    try:
        write_pack(path, parts, size=size, source=source.description, made_from=made_from, before=finish)
    except OSError as error:
        raise UserError(f"the packed set {path} cannot be written ({error.strerror})") from None


def _few_broken(
    source: Source, progress: Progress, max_bad: float, parts: Iterator[Part], before: list[tuple[str, str]], doing: str
) -> Iterator[Part]:
    """Pass the parts on; raise UserError as soon as too many entries, those of `before` included, are broken."""
    broken = [*(source.rejected if isinstance(source, Files) else []), *before]
    for part in parts:
        broken += part.broken
        _require_few_broken(broken, part.done, source.total, max_bad)
        yield part
        progress(doing, part.done, source.total)


def _require_few_broken(broken: list[tuple[str, str]], done: int, total: int, max_bad: float) -> None:
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
    broken = _all_broken(source, lines)
    text = [f"{name}{_BROKEN}{reason}" for name, reason in broken]
    text += [f"{name}\tleft out: not an image file by its name" for name in source.others]
    text += [
        f"{source.names[entry]}{_CONVERTED}"
        for line in lines
        for entry, *_, notes in line.files
        if notes & Note.CONVERTED
    ]
    with atomic(report) as file:
        file.write("".join(line + "\n" for line in text).encode(errors="surrogateescape"))


def _read_report(report: Path) -> list[str]:
    return report.read_text(encoding="utf-8", errors="surrogateescape").splitlines() if report.exists() else []


def _check_report(report: Path, total: int, max_bad: float) -> None:
    """Raise UserError where `report` names too many broken files; warn where it names any."""
    broken = [
        (name, reason) for line in _read_report(report) for name, mark, reason in [line.partition(_BROKEN)] if mark
    ]
    _require_few_broken(broken, total, total, max_bad)
    if broken:
        words = _broken_words([f"{name}: {reason}" for name, reason in broken], total, total)
        warnings.warn(f"{words}; left out, all named in {report}", stacklevel=3)
