"""How much memory a preset needs, and the largest batch that fits."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from fastbegan_kernels import tuning
from fastbegan_kernels.faults import is_out_of_memory

from ..config import ModelConfig, TrainConfig
from ..device import available_memory, without_search
from ..nets.models import build
from .cost import step_cost
from .step import TrainStep

_USABLE = 0.9  # of free memory: the rest is the library's workspaces and the loader


@dataclass(frozen=True)
class Capacity:
    """Bytes of a step, and the largest batch; `tried` says whether it ran or was worked out."""

    per_image: int
    fixed: int
    largest: int
    tried: bool


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
    """Whether two steps of `batch` images run in plain operations without running out of memory, with some to spare."""
    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device) - int((1 - _USABLE) * total)  # for the graph's pool, the sheet
    torch.cuda.reset_peak_memory_stats(device)
    try:
        # a kernel needs no more than the operations it replaces, and takes minutes to choose
        with tuning.observed(), without_search():
            _two_steps(model, replace(train, batch_size=batch), device, dtype)
        fitted = torch.cuda.max_memory_allocated(device) <= usable
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fitted = False
    gc.collect()  # before the cache is emptied: what cycles hold would stay in use
    torch.cuda.empty_cache()
    return fitted


def _two_steps(model: ModelConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype | None) -> None:
    step = TrainStep(*build(model, seed=0, device=device), train, dtype)
    real = torch.zeros(train.batch_size, 3, model.size, model.size, device=device)
    real = real.contiguous(memory_format=torch.channels_last)
    z = torch.zeros(train.batch_size, model.latent, device=device)
    for _ in range(2):
        step(real, z, z)
    torch.cuda.synchronize(device)
