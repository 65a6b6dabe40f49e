"""The choice of a run's loader: resident, packed, torch or dali."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch

from ..config import TrainConfig
from ..device import available_memory
from ..errors import UserError
from . import dali_loader
from .decode import Decoding
from .files_loader import TorchLoader
from .loader import Batching, Loader, PackedLoader, ResidentLoader
from .prepare import ImageSet, NoRoomError, Progress, load_catalogue, load_images, require_enough
from .source import Files, find_source

_SHARE = 0.4  # of the device's free memory; resident images may fill it
_FROM_FILES = {"torch": TorchLoader, "dali": dali_loader.DaliLoader}


def open_loader(
    train: TrainConfig, size: int, device: torch.device, progress: Progress, *, rank: int = 0, world: int = 1
) -> tuple[Loader, tuple[str, ...], dict[str, object]]:
    """Open the loader of a run; images are packed first unless `train.loader` reads files.

    Args:
        train: Settings of the run. `train.batch_size` counts the images that all ranks read per step.
        size: Height and width of the nets' images, in pixels.
        device: The device on which the step reads its batches.
        progress: Called while images are checked or packed.
        rank: Number of this process, 0 to `world` - 1.
        world: Number of ranks.

    Returns:
        The loader; lines about the images, of which the first gives the reason for this loader; and the identity of the
        images, for `same_images`: their count, the CRC-32 of the packed pixels, the digest of the files. A fact
        not known is None.

    Raises:
        UserError: The data are bad, or this machine cannot run the loader.
    """
    if train.batch_size % world:
        raise UserError(f"batch_size is {train.batch_size}; accepted on {world} ranks: multiples of {world}")
    batching = Batching(train.batch_size // world, size, train.seed, train.flip, train.jitter, rank, world, device)
    decoding = Decoding(train.crop, train.max_pixels)
    kind, reason = train.loader, "asked for"
    if kind not in _FROM_FILES:
        try:
            images = load_images(
                train.data,
                batching.stored,
                decoding,
                progress,
                minimum=train.batch_size,
                max_bad=train.max_bad,
                workers=train.workers,
            )
        except NoRoomError as error:
            source = find_source(train.data)
            if kind != "auto" or not isinstance(source, Files) or source.stream is not None:
                raise
            kind, reason = "dali" if dali_loader.INSTALLED else "torch", f"no room to pack them: {error}"
        else:
            loader, line = _from_pack(images, batching, kind)
            identity = {"count": loader.count, "crc32": images.crc32, "files": images.contents}
            return loader, (f"{images.description}; {line}", *images.remarks), identity
    catalogue = load_catalogue(
        train.data, batching.stored, decoding, progress, max_bad=train.max_bad, workers=train.workers
    )
    require_enough(len(catalogue.entries), train.batch_size, train.data, catalogue.remarks)
    loader = _FROM_FILES[kind](catalogue, batching, decoding, workers=train.workers, prefetch=train.prefetch)
    identity = {"count": loader.count, "crc32": None, "files": catalogue.contents}
    line = f"{catalogue.description}; loader {kind}: {reason}"
    if kind == "dali":
        line += f"; DALI converts nothing, {np.count_nonzero(catalogue.seen[:, 2]):,} of them go through Pillow first"
    return loader, (line, *catalogue.remarks), identity


def same_images(first: Mapping[str, object], second: Mapping[str, object]) -> bool:
    """Whether two identities from `open_loader` agree in every fact that both know (a fact not known is None).

    Loaders know different facts: one that reads files has no checksum of packed pixels.
    """
    return all(None in (value, second.get(name)) or value == second[name] for name, value in first.items())


def _from_pack(images: ImageSet, batching: Batching, kind: str) -> tuple[Loader, str]:
    """The resident or packed loader of `images`, and why this one."""
    needed = images.images.nbytes
    if kind == "resident" or (kind == "auto" and batching.device.type == "cuda"):
        free = available_memory(batching.device)
        room = f"{needed / 1e9:.2f} GB of {free / 1e9:.1f} GB free"
        if needed <= _SHARE * free:
            return ResidentLoader(images.images, batching), f"loader resident: {room}"
        if kind == "resident":
            raise UserError(f"loader resident would take {room}; accepted: up to {_SHARE:.0%} of it; take packed")
        return PackedLoader(images.images, batching), f"loader packed: resident they would take {room}"
    return PackedLoader(images.images, batching), f"loader packed: {'no GPU' if kind == 'auto' else 'asked for'}"
