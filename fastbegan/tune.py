"""The kernels of a run, chosen before it begins: tried, checked and timed once for each kind of GPU."""

from __future__ import annotations

from collections.abc import Callable

import torch

from fastbegan_kernels import normalize_images, tuning
from fastbegan_kernels.faults import is_out_of_memory

from .config import ModelConfig, TrainConfig
from .models import build
from .samples import COLUMNS, ROWS, training_sheet
from .step import TrainStep


def tune(
    model: ModelConfig,
    train: TrainConfig,
    device: torch.device,
    dtype: torch.dtype | None,
    say: Callable[[int, int], None] = lambda done, total: None,
) -> int:
    """Choose all kernels that a step of `train.batch_size` images and a sheet run; returns for how many problems.

    One step and one sheet run in plain operations, to see what they ask for. `say` is told how many kernels that are
    new on this kind of GPU were tried, and of how many. Nothing is chosen on a CPU, nor where that step does not fit.
    """
    if device.type != "cuda":
        return 0
    with tuning.observed() as asked:
        try:
            _run_once(model, train, device, dtype)
        except Exception as error:
            if not is_out_of_memory(error):
                raise
    torch.cuda.empty_cache()
    tuning.prepare(list(asked), say)
    return len(asked)


def _run_once(model: ModelConfig, train: TrainConfig, device: torch.device, dtype: torch.dtype | None) -> None:
    step = TrainStep(*build(model, seed=0, device=device), train, dtype)
    stored = torch.zeros(max(train.batch_size, COLUMNS * ROWS), model.size, model.size, 3, dtype=torch.uint8)
    images = normalize_images(stored.to(device))
    z = torch.zeros(len(images), model.latent, device=device)
    batch = z[: train.batch_size]
    step(images[: train.batch_size], batch, batch)
    count = COLUMNS * ROWS
    training_sheet(step.average, step.discriminator, images[:count], z[:count])
