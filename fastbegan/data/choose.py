"""Which loader a run reads its images with, and why."""

from __future__ import annotations

import torch

from ..config import TrainConfig
from ..device import available_memory
from ..errors import UserError
from . import dali_loader
from .files_loader import TorchLoader
from .loader import Batching, Loader, PackedLoader, ResidentLoader
from .prepare import ImageSet, NoRoomError, Progress, load_catalogue, load_images, require_enough
from .source import Files, find_source

_SHARE = 0.4  # of the device's free memory that images may fill
_FROM_FILES = {"torch": TorchLoader, "dali": dali_loader.DaliLoader}


def open_loader(
    train: TrainConfig, size: int, device: torch.device, progress: Progress, *, rank: int = 0, world: int = 1
) -> tuple[Loader, str, dict[str, object]]:
    """The loader of a run, a line about its images and itself, and what tells these images from others.

    That is their number, the checksum of the pixels where they are packed, and the digest of files where they are that.
    `train.batch_size` is what all ranks read together. Raises UserError for bad data, and for a loader that cannot be
    had here.
    """
    if train.batch_size % world:
        raise UserError(f"batch_size is {train.batch_size}; accepted on {world} ranks: multiples of {world}")
    batching = Batching(train.batch_size // world, size, train.seed, train.flip, train.jitter, rank, world, device)
    asked, why = train.loader, "asked for"
    if asked not in _FROM_FILES:
        try:
            images = load_images(
                train.data, batching.stored, train.crop, progress, minimum=train.batch_size, max_bad=train.max_bad,
                workers=train.workers,
            )  # fmt: skip
        except NoRoomError as error:
            if asked != "auto" or not isinstance(find_source(train.data), Files):
                raise
            asked, why = "dali" if dali_loader.INSTALLED else "torch", f"no room to pack them: {error}"
        else:
            loader, line = _from_pack(images, batching, asked)
            known = {"count": loader.count, "crc32": images.crc32, "files": images.contents}
            return loader, f"{images.description}; {line}", known
    catalogue = load_catalogue(train.data, train.crop, progress, max_bad=train.max_bad, workers=train.workers)
    require_enough(len(catalogue.requests), train.batch_size, train.data)
    loader = _FROM_FILES[asked](catalogue, batching, train.crop, workers=train.workers, prefetch=train.prefetch)
    known = {"count": loader.count, "crc32": None, "files": catalogue.contents}
    return loader, f"{catalogue.description}; loader {asked}: {why}", known


def same_images(one: dict[str, object], other: dict[str, object]) -> bool:
    """Whether what `open_loader` knows of two sets of images is no contradiction: loaders know different things."""
    return all(None in (value, other[name]) or value == other[name] for name, value in one.items())


def _from_pack(images: ImageSet, batching: Batching, asked: str) -> tuple[Loader, str]:
    needed = images.images.nbytes
    if asked == "resident" or (asked == "auto" and batching.device.type == "cuda"):
        free = available_memory(batching.device)
        room = f"{needed / 1e9:.2f} GB of {free / 1e9:.1f} GB free"
        if needed <= _SHARE * free:
            return ResidentLoader(images.images, batching), f"loader resident: {room}"
        if asked == "resident":
            raise UserError(f"loader resident would take {room}; accepted: up to {_SHARE:.0%} of it; take packed")
        return PackedLoader(images.images, batching), f"loader packed: resident they would take {room}"
    return PackedLoader(images.images, batching), f"loader packed: {'no GPU' if asked == 'auto' else 'asked for'}"
