"""How much memory a preset needs, and the largest batch that fits."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from .config import ModelConfig, TrainConfig
from .info import step_cost
from .models import build
from .step import TrainStep

_USABLE = 0.9  # of free memory: the rest is the library's workspaces and the loader


@dataclass(frozen=True)
class Capacity:
    """Bytes of a step, and the largest batch; `tried` says whether it ran or was worked out."""

    per_image: int
    fixed: int
    largest: int
    tried: bool


def available_memory(device: torch.device) -> int:
    """Bytes that are free on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def capacity(model: ModelConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype | None) -> Capacity:
    """Count on the meta device what a step keeps; on a GPU then run steps up to the batch that no longer fits."""
    cost = step_cost(model, replace(train, batch_size=1), dtype)
    fixed = cost.memory - cost.kept
    largest = max(0, int(_USABLE * available_memory(device)) - fixed) // cost.kept
    if device.type != "cuda":
        return Capacity(cost.kept, fixed, largest, tried=False)
    return Capacity(cost.kept, fixed, _search(lambda batch: fits(model, train, device, dtype, batch), largest), True)


def _search(fits_batch: Callable[[int], bool], guess: int) -> int:
    """The largest batch that fits, to an eighth, near `guess`; 0 if not even one image does."""
    batch = max(1, guess)
    if fits_batch(batch):
        while fits_batch(larger := batch + max(1, batch // 8)):
            batch = larger
        return batch
    while batch and not fits_batch(batch):
        batch = batch * 7 // 8 if batch > 8 else batch - 1
    return batch


def fits(model: ModelConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype | None, batch: int) -> bool:
    """Whether two steps of `batch` images run without running out of memory."""
    try:
        step = TrainStep(*build(model, seed=0, device=device), replace(train, batch_size=batch), dtype)
        real = torch.zeros(batch, 3, model.size, model.size, device=device)
        z = torch.zeros(batch, model.latent, device=device)
        for _ in range(2):
            step(real.contiguous(memory_format=torch.channels_last), z, z)
        torch.cuda.synchronize(device)
    except torch.OutOfMemoryError:
        return False
    finally:
        step = real = z = None  # what an exception's frames hold would still be counted
        torch.cuda.empty_cache()
    return True
