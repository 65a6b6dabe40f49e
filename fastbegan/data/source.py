"""Sources of images: portraits, folders, tar and TFRecord files, torchvision's data sets."""

from __future__ import annotations

import hashlib
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

import numpy as np

from ..errors import UserError
from . import arrays, faces, tfrecord
from .decode import VERSION
from .folder import SUFFIXES, list_images
from .pack import Part
from .workers import Request, Scaled, decode_all

_CHUNK = 512  # images of a part
ACCEPTED = (
    "'faces', 'faces:COUNT', a folder of images, a .tar (webdataset) or .tfrecord file or a folder of them, a .pack "
    "file, cifar10:ROOT or fashion-mnist:ROOT"
)


class Source(Protocol):
    """Entries in a fixed order, counted from 0; each is an image, or broken."""

    @property
    def description(self) -> str: ...

    @property
    def doing(self) -> str:
        """The work that progress names: "packing images" or "drawing portraits"."""
        ...

    @property
    def total(self) -> int:
        """Number of entries, broken ones included."""
        ...

    def made_from(self, crop: str) -> str:
        """A hash of everything that the pixels depend on, but for their size."""
        ...

    def parts(self, start: int, size: int, crop: str, workers: int | None) -> Iterator[Part]:
        """Decode entries, part by part.

        Args:
            start: First entry.
            size: Height and width to which images are scaled.
            crop: `center`, `none`, `celeba`, or a number of pixels.
            workers: Processes that decode files; None means one per core.
        """
        ...


def _hash(**values: object) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:20]


@dataclass
class Portraits:
    """Procedural portraits, drawn by number."""

    total: int
    doing: str = "drawing portraits"

    @property
    def description(self) -> str:
        return f"{self.total:,} procedural portraits"

    def made_from(self, crop: str) -> str:
        return _hash(faces=self.total, version=faces.VERSION)

    def parts(self, start: int, size: int, crop: str, workers: int | None) -> Iterator[Part]:
        import torch

        for first in range(start, self.total, _CHUNK):
            stop = min(first + _CHUNK, self.total)
            yield Part(stop, faces.faces(torch.arange(first, stop), size).numpy(), [], [])


@dataclass
class Arrays:
    """Small pictures in memory, uint8 [count, height, width, 3], scaled as files are."""

    description: str
    pictures: np.ndarray
    doing: str = "packing images"

    @property
    def total(self) -> int:
        return len(self.pictures)

    def made_from(self, crop: str) -> str:
        return _hash(
            pixels=hashlib.sha256(np.ascontiguousarray(self.pictures).tobytes()).hexdigest(), crop=crop, version=VERSION
        )

    def parts(self, start: int, size: int, crop: str, workers: int | None) -> Iterator[Part]:
        for first in range(start, self.total, _CHUNK):
            chunk = self.pictures[first : first + _CHUNK]
            yield Part(first + len(chunk), arrays.scaled(chunk, size, crop), [], [])


@dataclass
class Files:
    """Encoded pictures: files, or ranges of bytes in archives."""

    description: str
    requests: list[Request]
    names: list[str]
    digest: str
    """Hash of paths, lengths and times of change."""
    contents: str
    """Hash of names within the source and lengths only, so a copy elsewhere has the same."""
    rejected: list[tuple[str, str]] = field(default_factory=list)
    others: list[str] = field(default_factory=list)
    doing: str = "packing images"

    @property
    def total(self) -> int:
        return len(self.requests)

    def made_from(self, crop: str) -> str:
        return _hash(files=self.digest, crop=crop, version=VERSION)

    def parts(self, start: int, size: int, crop: str, workers: int | None) -> Iterator[Part]:
        answers = decode_all(self.requests[start:], size, crop, workers=workers)
        done = start
        while chunk := list(islice(answers, _CHUNK)):
            good, files, broken = [], [], []
            for number, (_, answer) in enumerate(chunk, done):
                if isinstance(answer, Scaled):
                    good.append(answer.pixels)
                    files.append((number, answer.width, answer.height, answer.notes))
                else:
                    broken.append((self.names[number], str(answer)))
            done += len(chunk)
            yield Part(done, np.stack(good) if good else np.empty((0, size, size, 3), np.uint8), files, broken)


def absolute(data: str) -> str:
    """`data` with an absolute path. (`faces` means portraits; a folder of that name is `./faces`.)"""
    kind, _, rest = data.partition(":")
    if kind in arrays.NAMES:
        return f"{kind}:{Path(rest).resolve()}"
    return data if kind == "faces" else str(Path(data).resolve())


def without_folders(data: str) -> str:
    """`data` with only the last part of its path, for pages that are passed on."""
    kind, _, rest = data.partition(":")
    return f"{kind}:{Path(rest).name}" if kind in arrays.NAMES else Path(data).name or data


def find_source(data: str) -> Source:
    """Open the source that `data` names (see ACCEPTED). Raises UserError where there is none."""
    kind, _, rest = data.partition(":")
    if kind == "faces":
        return Portraits(_count(data))
    if kind in arrays.NAMES:
        return Arrays(*arrays.load(kind, Path(rest)))
    path = Path(data)
    return _archive(path.resolve()) if path.is_file() and _is_archive(path.name) else _folder(path)


def _count(data: str) -> int:
    number = data.removeprefix("faces").removeprefix(":")
    if data == "faces":
        return faces.DEFAULT_COUNT
    if not number.isdecimal() or int(number) < 1:
        raise UserError(f"data is {data!r}; accepted: {ACCEPTED}; COUNT from 1")
    return int(number)


def _digest(start: str, rows: Iterable[tuple[object, ...]]) -> str:
    digest = hashlib.sha256(os.fsencode(start))
    for row in rows:
        digest.update(os.fsencode("\0".join(map(str, row)) + "\n"))
    return digest.hexdigest()


def _folder(path: Path) -> Files:
    if not path.is_dir():
        kind = "is a file" if path.exists() else "does not exist"
        raise UserError(f"data {str(path)!r} {kind}; accepted: {ACCEPTED}")
    folder = path.resolve()
    listing = list_images(folder)
    if not listing.images and (shards := [folder / name for name in sorted(listing.others) if _is_archive(name)]):
        if lost := [str(path) for path in shards if not path.is_file()]:
            raise UserError(f"data {lost[0]} is no file that can be read; repair or remove it")
        return _joined(folder, [_archive(path) for path in shards])
    names = [f"{folder}{os.sep}{file.path}" for file in listing.images]
    rejected = [(str(folder / name), reason) for name, reason in listing.rejected]
    digest = _digest(str(folder), [*listing.images, *rejected])
    contents = _digest("", [(file.path, file.size) for file in listing.images])
    others = [str(folder / name) for name in listing.others]
    return Files(f"images of {folder}", [Request(name) for name in names], names, digest, contents, rejected, others)


def _is_archive(name: str) -> bool:
    return name.endswith(".tar") or ".tfrecord" in name  # NAME.tfrecord-00000-of-00010


def _archive(path: Path) -> Files:
    return _tar(path) if path.name.endswith(".tar") else _records(path)


def _joined(folder: Path, shards: list[Files]) -> Files:
    """One source of several shards, in the order given."""
    digest = _digest(str(folder), [(shard.digest,) for shard in shards])
    return Files(
        f"images of {len(shards)} files in {folder}",
        [request for shard in shards for request in shard.requests],
        [name for shard in shards for name in shard.names],
        digest,
        _digest("", [(shard.contents,) for shard in shards]),
        [entry for shard in shards for entry in shard.rejected],
        others=[name for shard in shards for name in shard.others],
    )


def _tar(path: Path) -> Files:
    """Pictures of a tar file in its order, as webdataset writes them; this reads the headers only."""
    requests, names, others = [], [], []
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if not member.isfile() or any(part.startswith(".") for part in Path(member.name).parts):
                    continue
                if Path(member.name).suffix.lower() in SUFFIXES:
                    requests.append(Request(str(path), member.offset_data, member.size))
                    names.append(f"{path}:{member.name}")
                else:
                    others.append(f"{path}:{member.name}")
            end = tar.offset
    except (tarfile.TarError, OSError) as error:
        raise UserError(f"data {path} cannot be read as an uncompressed tar file: {error}") from None
    with path.open("rb") as file:  # tarfile takes a damaged header for the end of the archive
        file.seek(end)
        while block := file.read(1 << 20):
            if block.strip(b"\0"):
                raise UserError(f"data {path} is damaged: what follows byte {end:,} is no entry of a tar file")
    return Files(f"images of {path}", requests, names, *_digests(path, requests), [], others)


def _records(path: Path) -> Files:
    """Pictures of a TFRecord file, in the order of its records."""
    requests, names, rejected = [], [], []
    for number, place in enumerate(tfrecord.pictures(path)):
        if isinstance(place, str):
            rejected.append((f"{path}:{number}", place))
        else:
            requests.append(Request(str(path), *place))
            names.append(f"{path}:{number}")
    return Files(f"images of {path}", requests, names, *_digests(path, requests), rejected)


def _digests(path: Path, requests: list[Request]) -> tuple[str, str]:
    """`digest` and `contents` of an archive: of the file and the places of its pictures, and of the places alone."""
    status = path.stat()
    rows = [(request.offset, request.length) for request in requests]
    return _digest(str(path), [(status.st_size, status.st_mtime_ns), *rows]), _digest("", rows)
