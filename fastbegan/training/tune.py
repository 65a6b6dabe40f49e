"""Chooses the kernels of a run before it begins: each is checked and timed once per kind of GPU."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import torch

from fastbegan_kernels import normalize_images, tuning
from fastbegan_kernels.faults import in_short

from ..config import ModelConfig, TrainConfig
from ..device import without_search
from ..distributed.ranks import Ranks
from ..nets.models import build
from ..runs.sheets import COLUMNS, ROWS, training_sheet
from .step import TrainStep


def tune(
    model: ModelConfig,
    train: TrainConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Choose all kernels of a training step and a sheet. On a CPU, do nothing.

    One step and one sheet run in plain operations, to record which kernels they call. If this fails, a warning says so,
    and each kernel is chosen at its first call.

    Args:
        model: Size of the nets.
        train: Kind of step; `batch_size` is that of this rank.
        device: The GPU.
        dtype: Compute type; None means float32.
        say: Called with the number of kernels tried and the number to try; those known for this GPU do not count.

    Returns:
        The number of failures: kernels for which no form could be chosen, plus one if the step failed.
    """
    if device.type != "cuda":
        return 0
    failed = 0
    with tuning.observed() as calls:
        try:
            with without_search():
                _run_once(model, train, device, dtype)
        except Exception as error:  # the run may still work
            failed = 1
            warnings.warn(f"kernels could not be chosen beforehand: {in_short(error)}", stacklevel=2)
    torch.cuda.empty_cache()
    failed += tuning.prepare(list(calls), say)
    torch.cuda.empty_cache()
    return failed


def tune_for_all(
    model: ModelConfig,
    train: TrainConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    ranks: Ranks,
    say: Callable[[int, int], None],
) -> None:
    """Choose kernels on rank 0, for one rank's share of `train.batch_size`; all ranks adopt them. On a CPU, nothing."""
    if device.type != "cuda":
        return
    if ranks.first:
        tune(model, replace(train, batch_size=train.batch_size // ranks.world), device, dtype, say)
    if not ranks.alone:
        tuning.adopt(device, ranks.from_first(tuning.choices(device)))


def _run_once(model: ModelConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype | None) -> None:
    step = TrainStep(*build(model, seed=0, device=device), train, dtype)
    stored = torch.zeros(max(train.batch_size, COLUMNS * ROWS), model.size, model.size, 3, dtype=torch.uint8)
    images = normalize_images(stored.to(device))
    z = torch.zeros(len(images), model.latent, device=device)
    batch = z[: train.batch_size]
    step(images[: train.batch_size], batch, batch)
    count = COLUMNS * ROWS
    training_sheet(step.average, step.discriminator, images[:count], z[:count])
