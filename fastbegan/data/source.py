"""Sources of images: drawn ones, folders, archives, torchvision's data sets."""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError
from . import arrays
from .containers import Container, from_listing, open_archive
from .decode import VERSION, Decoding
from .folder import ImageFile, LeftOut, Listing, is_archive, list_images
from .pack import Part
from .styles import DEFAULT_COUNT, STYLES, style_of
from .workers import Entry, Scaled, decode_all

_CHUNK = 512  # images of a part
ACCEPTED = (
    "'faces', 'portraits', either with :COUNT, a folder of images, a .tar, .zip, .tfrecord or .parquet file or a "
    "folder of them, a .pack file, cifar10:ROOT or fashion-mnist:ROOT"
)
_ARCHIVES = 2  # times as much room as its pictures: from there on a folder's archives are the set


class Source(Protocol):
    """Entries in a fixed order, counted from 0; each is an image, or broken."""

    @property
    def description(self) -> str: ...

    @property
    def doing(self) -> str:
        """The work that progress names: "packing images" or "drawing faces"."""
        ...

    @property
    def total(self) -> int | None:
        """Number of entries, broken ones included; None where only `parts` tells."""
        ...

    def made_from(self, decoding: Decoding) -> str:
        """A hash of everything that the pixels depend on, but for their size."""
        ...

    def parts(self, start: int, size: int, decoding: Decoding, workers: int | None) -> Iterator[Part]:
        """Decode entries, part by part.

        Args:
            start: First entry.
            size: Height and width to which images are scaled.
            decoding: The part that is kept, and the largest that is decoded.
            workers: Processes that decode files; None means one per core.
        """
        ...


def _hash(**values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:20]


@dataclass
class Drawn:
    """Procedural images, drawn by number."""

    style: str
    """A key of STYLES."""
    total: int

    @property
    def doing(self) -> str:
        return f"drawing {self.style}"

    @property
    def description(self) -> str:
        return f"{self.total:,} procedural {self.style}"

    def made_from(self, decoding: Decoding) -> str:
        return _hash(**{self.style: self.total}, version=STYLES[self.style].version)

    def parts(self, start: int, size: int, decoding: Decoding, workers: int | None) -> Iterator[Part]:
        import torch

        for first in range(start, self.total, _CHUNK):
            stop = min(first + _CHUNK, self.total)
            yield Part(stop, STYLES[self.style].draw(torch.arange(first, stop), size).numpy(), [], [])


@dataclass
class Arrays:
    """Small pictures in memory, uint8 [count, height, width, 3], scaled as files are."""

    description: str
    pictures: np.ndarray
    doing: str = "packing images"

    @property
    def total(self) -> int:
        return len(self.pictures)

    def made_from(self, decoding: Decoding) -> str:
        return _hash(
            pixels=hashlib.sha256(np.ascontiguousarray(self.pictures).tobytes()).hexdigest(),
            crop=decoding.crop,
            version=VERSION,
        )

    def parts(self, start: int, size: int, decoding: Decoding, workers: int | None) -> Iterator[Part]:
        for first in range(start, self.total, _CHUNK):
            chunk = self.pictures[first : first + _CHUNK]
            yield Part(first + len(chunk), arrays.scaled(chunk, size, decoding.crop), [], [])


@dataclass
class Files:
    """Encoded pictures: files, or members of archives."""

    description: str
    containers: list[Container]
    digest: str
    """Hash of paths, lengths and times of change."""
    contents: str
    """Hash of names within the source and lengths only, so a copy elsewhere has the same."""
    beside: list[LeftOut] = field(default_factory=list)
    """What lies beside the containers and is not taken."""
    doing: str = "packing images"
    names: list[str] = field(default_factory=list)
    """Of all entries; where one container is a stream, of those that `parts` has read."""

    def __post_init__(self) -> None:
        if self.stream is None:
            self.names = [entry.name for entry in self.entries]

    @property
    def stream(self) -> Path | None:
        """The first container without random access."""
        return next((container.path for container in self.containers if container.stream is not None), None)

    @property
    def entries(self) -> list[Entry]:
        """All pictures, where no container is a stream."""
        return [entry for container in self.containers for entry in container.entries]

    @property
    def left_out(self) -> list[LeftOut]:
        """What is not taken; complete after `parts` where a container is a stream."""
        return [*self.beside, *(item for container in self.containers for item in container.left_out)]

    @property
    def total(self) -> int | None:
        counts = [container.total for container in self.containers]
        return sum(count for count in counts if count is not None) if None not in counts else None

    def made_from(self, decoding: Decoding) -> str:
        return _hash(files=self.digest, decoding=vars(decoding), version=VERSION)

    def parts(self, start: int, size: int, decoding: Decoding, workers: int | None) -> Iterator[Part]:
        answers, done = decode_all(self._read(start), size, decoding, workers=workers), start
        while chunk := list(islice(answers, _CHUNK)):
            good, files, broken = [], [], []
            for number, (entry, answer) in enumerate(chunk, done):
                if isinstance(answer, Scaled):
                    good.append(answer.pixels)
                    files.append((number, answer.width, answer.height, answer.notes))
                else:
                    broken.append((entry.name, str(answer)))
            done += len(chunk)
            yield Part(done, np.stack(good) if good else np.empty((0, size, size, 3), np.uint8), files, broken)

    def _read(self, start: int) -> Iterator[Entry]:
        """The entries from `start` on. A stream is read from its beginning, for its names."""
        if self.stream is None:
            yield from islice(self.entries, start, None)
            return
        self.names.clear()
        for container in self.containers:
            for entry in container.read():
                self.names.append(entry.name)
                if len(self.names) > start:
                    yield entry


def absolute(data: str) -> str:
    """`data` with an absolute path. (`faces` are drawn; a folder of that name is `./faces`.)"""
    kind, _, rest = data.partition(":")
    if kind in arrays.NAMES:
        return f"{kind}:{Path(rest).resolve()}"
    return data if style_of(data) else str(Path(data).resolve())


def without_folders(data: str) -> str:
    """`data` with only the last part of its path, for pages that are passed on."""
    kind, _, rest = data.partition(":")
    return f"{kind}:{Path(rest).name}" if kind in arrays.NAMES else Path(data).name or data


def find_source(data: str) -> Source:
    """Open the source that `data` names (see ACCEPTED). Raises UserError where there is none."""
    kind, _, rest = data.partition(":")
    if style := style_of(data):
        return Drawn(style, _count(data, style))
    if kind in arrays.NAMES:
        return Arrays(*arrays.load(kind, Path(rest)))
    path = Path(data)
    return _archive(path.resolve()) if path.is_file() and is_archive(path.name) else _folder(path)


def _count(data: str, style: str) -> int:
    number = data.removeprefix(style).removeprefix(":")
    if data == style:
        return DEFAULT_COUNT
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"data is {data!r}; accepted: {ACCEPTED}; COUNT from 1")
    return int(number)


def _digest(start: str, rows: Iterable[tuple[object, ...]]) -> str:
    digest = hashlib.sha256(os.fsencode(start))
    for row in rows:
        digest.update(os.fsencode("\0".join(map(str, row)) + "\n"))
    return digest.hexdigest()


def _folder(path: Path) -> Files:
    """A folder of pictures or of archives: whichever takes more room, for previews lie beside archives."""
    if not path.is_dir():
        pack = "is a pack, which holds no files (see: fastbegan data info)"
        kind = (pack if path.suffix == ".pack" else "is a file") if path.exists() else "does not exist"
        raise UserError(f"data {str(path)!r} {kind}; accepted: {ACCEPTED}")
    folder = path.resolve()
    listing = list_images(folder)
    container = from_listing(folder, listing)
    archives = _archives(folder, listing, _ARCHIVES * container.room)
    if not archives:
        return Files(
            f"images of {folder}", [container], _digest(str(folder), listing.images), _digest("", container.identity)
        )
    previews = [LeftOut(entry.name, "pictures beside archives") for entry in container.entries]
    others = [item for item in container.left_out if not is_archive(item.name)]
    digest = _digest(str(folder), [(_archive_digest(archive),) for archive in archives])
    contents = _digest("", [(_digest("", archive.identity),) for archive in archives])
    return Files(f"images of {len(archives)} files in {folder}", archives, digest, contents, [*previews, *others])


def _archives(folder: Path, listing: Listing, least: int) -> list[Container]:
    """The archives of a folder; none where their pictures take fewer than `least` bytes, as beside other pictures."""
    files = [file for file in listing.others if is_archive(file.path)]
    if sum(file.size for file in files) < least:
        return []  # without looking into them
    opened = [_open_or_not(folder, file) for file in files]
    archives = [archive for archive in opened if isinstance(archive, Container)]
    damage = next((error for error in opened if isinstance(error, UserError)), None)
    enough = sum(archive.room for archive in archives) >= least
    if damage is not None:
        if enough or not listing.images:
            raise damage
        warnings.warn(f"{damage}; the pictures beside it are taken", stacklevel=2)
    return archives if enough else []


def _open_or_not(folder: Path, file: ImageFile) -> Container | UserError:
    if file.reason:
        return UserError(f"data {folder / file.path} is no file that can be read; repair or remove it")
    try:
        return open_archive(folder / file.path)
    except UserError as error:
        return error


def _archive(path: Path) -> Files:
    container = open_archive(path)
    return Files(f"images of {path}", [container], _archive_digest(container), _digest("", container.identity))


def _archive_digest(archive: Container) -> str:
    status = archive.path.stat()
    return _digest(str(archive.path), [(status.st_size, status.st_mtime_ns), *archive.identity])
