"""The kernels of a run, chosen before it begins: tried, checked and timed once for each kind of GPU."""

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
    """Choose all kernels that a step of `train.batch_size` images and a sheet run; returns for how many it failed.

    One step and one sheet run in plain operations, to see what they ask for. `say` is told how many kernels that are
    new on this kind of GPU were tried, and of how many. Nothing is chosen on a CPU. Where that step does not run, a
    warning says so, and kernels are chosen when they are met.
    """
    if device.type != "cuda":
        return 0
    failed = 0
    with tuning.observed() as asked:
        try:
            with without_search():
                _run_once(model, train, device, dtype)
        except Exception as error:  # the run itself may go on
            failed = 1
            warnings.warn(f"kernels could not be chosen beforehand: {in_short(error)}", stacklevel=2)
    torch.cuda.empty_cache()
    failed += tuning.prepare(list(asked), say)
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
    """On GPUs all ranks take what is fastest on the first one's, for their part of `train.batch_size`."""
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
