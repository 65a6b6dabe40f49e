"""The memory of a preset's step, and the largest batch that fits."""

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

_USABLE = 0.9  # share of free memory; the rest is for workspaces of libraries and the loader


@dataclass(frozen=True)
class Capacity:
    """The memory of a step."""

    per_image: int
    """Bytes for each image of the batch."""
    fixed: int
    """Bytes for any batch."""
    largest: int
    """The largest batch that fits, 0 for none."""
    tried: bool
    """Whether steps of `largest` images were run, or it is only computed."""


def capacity(model: ModelConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype | None) -> Capacity:
    """Find the largest batch of a preset.

    Args:
        model: Size of the nets.
        train: Kind of step; its batch size is ignored.
        device: On a CPU the result is computed from counts. On a GPU steps are run up to the batch that does not fit.
        dtype: Compute type; None means float32.

    Returns:
        Bytes per image and in all, and the batch.
    """
    cost = step_cost(model, replace(train, batch_size=1), dtype)
    fixed = cost.memory - cost.kept
    largest = max(0, int(_USABLE * available_memory(device)) - fixed) // cost.kept
    if device.type != "cuda":
        return Capacity(cost.kept, fixed, largest, tried=False)
    return Capacity(cost.kept, fixed, _search(lambda batch: fits(model, train, device, dtype, batch), largest), True)


def _search(fits_batch: Callable[[int], bool], guess: int) -> int:
    """The largest batch that fits, to within an eighth, searched from `guess`; 0 if not even one image fits."""
    batch = max(1, guess)
    if fits_batch(batch):
        while fits_batch(larger := batch + max(1, batch // 8)):
            batch = larger
        return batch
    while batch and not fits_batch(batch):
        batch = batch * 7 // 8 if batch > 8 else batch - 1
    return batch


def fits(model: ModelConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype | None, batch: int) -> bool:
    """Whether two steps of `batch` images fit into the GPU's memory, with a tenth of it to spare."""
    free, total = torch.cuda.mem_get_info(device)
    usable = free + torch.cuda.memory_reserved(device) - int((1 - _USABLE) * total)  # the graph's pool, the sheet
    torch.cuda.reset_peak_memory_stats(device)
    try:
        # plain operations: kernels need no more memory than these, and choosing them takes minutes
        with tuning.observed(), without_search():
            _two_steps(model, replace(train, batch_size=batch), device, dtype)
        fitted = torch.cuda.max_memory_allocated(device) <= usable
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        fitted = False
    gc.collect()  # tensors in reference cycles would keep their memory from `empty_cache`
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
