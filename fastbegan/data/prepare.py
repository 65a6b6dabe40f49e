"""`--data` to a packed set, or to the list of its good files: made once, then found in the cache by their hash."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np

from ..errors import UserError
from ..files import atomic, locked, make_folder, printable
from . import report
from .decode import Decoding
from .pack import OFFSET, DamagedPackError, Line, PackHeader, Part, leftovers, read_journal, read_pack, write_pack
from .source import Files, Source, find_source
from .workers import Entry

_STALE_SECONDS = 86_400  # after that long, leftovers of a killed process are removed
_NAMED = 3  # broken files that a message names

Progress = Callable[[str, int, int], None]
"""Called with the name of the work, the number of entries done, and their total, 0 where nobody knows it."""


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
    remarks: tuple[str, ...] = ()
    """Lines about what was left out, converted or enlarged."""
    contents: str | None = None
    """Digest of the files' names and lengths; None where the source has no files."""


@dataclass(frozen=True)
class Catalogue:
    """The files of a source that can be decoded, in the order of a pack."""

    entries: list[Entry]
    """None of a source without random access."""
    seen: np.ndarray
    """int64 [count, 3]: width, height and `decode.Note`."""
    broken: list[tuple[str, str]]
    """Name and reason of every other file."""
    remarks: tuple[str, ...]
    """Lines about what was left out, converted or enlarged."""
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
    decoding: Decoding,
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
        decoding: The part that is kept, and the largest that is decoded.
        progress: Called while images are packed.
        minimum: Images that the caller needs.
        max_bad: Percentage of broken files up to which they are left out.
        workers: Processes that decode; None means one per core.

    Raises:
        UserError: The source is missing, has too few images or too many broken files, or does not fit on the disk.
    """
    if Path(data).suffix == ".pack" and Path(data).is_file():
        image_set = _open_pack(Path(data), size)
    else:
        source = find_source(data)
        _require_entries(source, minimum, data)
        key = hashlib.sha256(f"{source.made_from(decoding)} {size}".encode()).hexdigest()[:20]
        path = cache_folder() / f"{key}.pack"
        image_set = make_pack(data, path, size, decoding, progress, source=source, max_bad=max_bad, workers=workers)
    require_enough(len(image_set.images), minimum, data, image_set.remarks)
    return image_set


def make_pack(
    data: str,
    path: Path,
    size: int,
    decoding: Decoding,
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
        decoding: The part that is kept, and the largest that is decoded.
        progress: Called while images are packed.
        source: The source of `data`, where the caller has opened it.
        max_bad: Percentage of broken files up to which they are left out.
        workers: Processes that decode; None means one per core.

    Raises:
        UserError: The source is bad, has too many broken files, does not fit on the disk, or `path` holds another
            source's images.
    """
    source = find_source(data) if source is None else source
    _require_entries(source, 1, data)
    made_from = source.made_from(decoding)

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
            warnings.warn(f"{path} was made of other files, or otherwise; packing again", stacklevel=3)
            return None
        return _image_set(images, header, path, max_bad, source)

    if (image_set := existing()) is None:
        make_folder(path.parent)
        with locked(path, lambda: progress("waiting for another process that packs it", 0, source.total or 0)):
            if (image_set := existing()) is None:  # else the process that held the lock has made it
                _remove_stale(path)
                _require_room(path, source.total or 0, size)
                # rejected.txt has to be there before the pack appears
                files = isinstance(source, Files)
                finish = partial(_finish_files, data, source, decoding, size) if files else _finish
                accept = partial(_few_broken, source, progress, max_bad)
                _write(source, path, size, decoding, workers, accept, partial(finish, path))
                images, header = read_pack(path, check_below=0)  # the checksum was computed while writing
                image_set = _image_set(images, header, path, max_bad, source, ", packed now")
    return replace(image_set, contents=source.contents) if isinstance(source, Files) else image_set


def load_catalogue(
    data: str,
    size: int,
    decoding: Decoding,
    progress: Progress,
    *,
    max_bad: float = 1.0,
    workers: int | None = None,
    again: bool = False,
) -> Catalogue:
    """List the good files of `data`: each was decoded strictly once, now or for the cache.

    Args:
        data: The source, as `source.find_source` takes it.
        size: Height and width of the images that they are to become, in pixels.
        decoding: The part that is kept, and the largest that is decoded.
        progress: Called while files are checked.
        max_bad: Percentage of broken files up to which they are left out.
        workers: Processes that decode; None means one per core.
        again: Decode all files now, whatever the cache holds; then a source needs no random access.

    Raises:
        UserError: The source is missing, is not made of files, cannot be read at random, or has too many broken files.
    """
    source = find_source(data)
    if not isinstance(source, Files):
        raise UserError(f"data {data!r} is not made of picture files; accepted here: folders and archives")
    if source.stream is not None and not again:
        raise UserError(
            f"data {source.stream} can only be read from front to back; loaders torch and dali accept folders, .tar, "
            ".tfrecord and uncompressed .zip files; take loader packed"
        )
    made_from = source.made_from(decoding)
    path = _catalogue_path(made_from)
    make_folder(path.parent)
    with locked(path, lambda: progress("waiting for another process that checks it", 0, source.total or 0)):
        lines = [] if again else read_journal(path, made_from)
        if not lines or lines[-1].done < (source.total or 0):
            lines = []
            parts = source.parts(0, 8, decoding, workers)  # 8 px: only whether they decode matters
            for part in _few_broken(source, progress, max_bad, parts, [], "checking images"):
                lines.append(Line(part.done, 0, 0, part.files, part.broken))
            try:
                _write_catalogue(path, made_from, lines)
            except UserError as error:  # it only saves time, and decoding all may have taken hours
                warnings.warn(str(error), stacklevel=2)
    files = [file for line in lines for file in line.files]
    broken = [entry for line in lines for entry in line.broken]
    total = len(files) + len(broken)
    if not again:  # else the caller names them
        _tell_broken(broken, total, max_bad, "fastbegan data check names all")
    seen = np.array([file[1:] for file in files], dtype=np.int64).reshape(-1, 3)
    description = f"{source.description}, {len(files):,} of {total:,} good"
    entries = source.entries if source.stream is None else []
    remarks = report.remarks(report.rows(source, lines, decoding, size))
    good = [entries[entry] for entry, *_ in files] if entries else []
    return Catalogue(good, seen, broken, remarks, description, source.contents)


def _catalogue_path(made_from: str) -> Path:
    return cache_folder() / f"{made_from}.files.jsonl"


def _write_catalogue(path: Path, made_from: str, lines: list[Line]) -> None:
    make_folder(path.parent)
    with atomic(path) as file:
        for value in (made_from, *map(vars, lines)):
            file.write((json.dumps(value) + "\n").encode())


def _open_pack(path: Path, size: int) -> ImageSet:
    """A pack that the user names as data."""
    try:
        images, header = read_pack(path)
    except DamagedPackError as error:
        raise UserError(f"{error}; make it again with: fastbegan data pack") from None
    if header.size != size:
        raise UserError(f"{path} holds images of {header.size} px; {size} are wanted: pack them with --size {size}")
    return _image_set(images, header, path, 100.0)  # who packed them has decided how many are too many


def _image_set(
    images: np.ndarray, header: PackHeader, path: Path, max_bad: float, source: Source | None = None, more: str = ""
) -> ImageSet:
    """A pack with what its report says. Raises UserError where that names too many broken files for this caller."""
    rows = report.read(_report_file(path))
    broken = [(name, detail) for name, kind, detail in rows if kind == report.BROKEN]
    _tell_broken(broken, header.count + len(broken), max_bad, f"all named in {_report_file(path)}")
    if isinstance(source, Files) and source.stream is None:  # other files may lie beside the pictures by now
        rows = [*map(report.left_out, source.left_out), *(row for row in rows if row.kind != report.LEFT_OUT)]
    remarks = (*report.remarks(rows), *report.faint(images))
    return ImageSet(images, header.crc32, f"{header.source}, {header.count:,} at {header.size} px{more}", remarks)


def _report_file(pack: Path) -> Path:
    return pack.with_suffix(".rejected.txt")


def _require_entries(source: Source, minimum: int, data: str) -> None:
    """Raises UserError where a source is known to have too few entries before any is decoded."""
    if source.total is not None:
        left_out = source.left_out if isinstance(source, Files) else []
        require_enough(source.total, minimum, data, report.remarks(map(report.left_out, left_out)))


def require_enough(count: int, minimum: int, data: str, remarks: Sequence[str] = ()) -> None:
    """Raises UserError, which repeats the remarks, where there are fewer images than a batch needs."""
    if count < minimum:
        images = "no images" if count == 0 else f"only {count} images"
        raise UserError("; ".join((f"data {data!r} has {images}; a batch needs {minimum}", *remarks)))


def _require_room(path: Path, total: int, size: int) -> None:
    needed, unfinished = OFFSET + total * size * size * 3, leftovers(path)[0]
    written = unfinished.stat().st_size if unfinished.exists() else 0
    free = shutil.disk_usage(path.parent).free
    if needed - written > free:
        raise NoRoomError(
            f"{path} would take {needed / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free there; make room, or set "
            f"FASTBEGAN_CACHE to a folder with room"
        )


def _finish_files(data: str, source: Files, decoding: Decoding, size: int, path: Path, lines: list[Line]) -> None:
    """Before a pack of files appears: check that they have not changed, and write report and catalogue."""
    made_from = source.made_from(decoding)
    rows = list(report.rows(source, lines, decoding, size))
    if not any(line.files for line in lines):
        require_enough(0, 1, data, report.remarks(rows))
    if find_source(data).made_from(decoding) != made_from:
        for leftover in leftovers(path):
            leftover.unlink(missing_ok=True)
        raise UserError(f"{source.description} changed while they were packed; pack them when nobody writes there")
    report.write(_report_file(path), rows)
    _write_catalogue(_catalogue_path(made_from), made_from, lines)


def _finish(path: Path, _: list[Line]) -> None:
    _report_file(path).unlink(missing_ok=True)  # an earlier pack of files may have left it


def _remove_stale(path: Path) -> None:
    """Remove leftovers of other packs in the folder of `path` that no process has written to for a day."""
    resumable = leftovers(path)
    for stale in (*path.parent.glob(".*.pack.partial"), *path.parent.glob(".*.pack.journal")):
        if stale not in resumable and time.time() - stale.stat().st_mtime > _STALE_SECONDS:
            stale.unlink(missing_ok=True)


def _write(
    source: Source, path: Path, size: int, decoding: Decoding, workers: int | None, accept: _Accept, finish: _Finish
) -> None:
    made_from = source.made_from(decoding)
    journal = read_journal(leftovers(path)[1], made_from)  # write_pack starts the file anew

    def parts(start: int) -> Iterator[Part]:
        broken = [entry for line in journal if line.done <= start for entry in line.broken]
        return accept(source.parts(start, size, decoding, workers), broken, source.doing)

    try:
        write_pack(path, parts, size=size, source=source.description, made_from=made_from, before=finish)
    except OSError as error:
        raise UserError(f"the packed set {path} cannot be written ({error.strerror})") from None


def _few_broken(
    source: Source, progress: Progress, max_bad: float, parts: Iterator[Part], before: list[tuple[str, str]], doing: str
) -> Iterator[Part]:
    """Pass the parts on; raise UserError as soon as too many entries, those of `before` included, are broken."""
    broken, done, total = list(before), 0, source.total
    for part in parts:
        broken.extend(part.broken)
        done = part.done
        if total is not None:  # else only the end tells how many are too many
            _require_few_broken(broken, done, total, max_bad)
        yield part
        progress(doing, done, total or 0)
    if total is None:
        _require_few_broken(broken, done, done, max_bad)


def _require_few_broken(broken: list[tuple[str, str]], done: int, total: int, max_bad: float) -> None:
    if len(broken) > max_bad / 100 * total:
        raise UserError(
            f"{_broken_words(broken, done, total)}; max_bad accepts "
            f"{max_bad:g} percent: repair them, remove them or raise it (fastbegan data check names all)"
        )


def _broken_words(broken: list[tuple[str, str]], done: int, total: int) -> str:
    where = f"{total:,} images" if done >= total else f"the first {done:,} of {total:,} images"
    more = "; ..." if len(broken) > _NAMED else ""
    named = "; ".join(printable(f"{name}: {reason}") for name, reason in broken[:_NAMED])
    return f"{len(broken)} of {where} are broken ({named}{more})"


def _tell_broken(broken: list[tuple[str, str]], total: int, max_bad: float, where: str) -> None:
    """Raise UserError for too many broken files; warn of any, with the words that tell `where` all are named."""
    _require_few_broken(broken, total, total, max_bad)
    if broken:
        warnings.warn(f"{_broken_words(broken, total, total)}; left out, {where}", stacklevel=4)
