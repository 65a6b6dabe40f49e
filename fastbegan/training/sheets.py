"""Sample sheets of a running training: always of the same real images and the same latents."""

from __future__ import annotations

import torch

from fastbegan_kernels import normalize_images

from ..config import TrainConfig
from ..data.loader import Loader
from ..distributed.ranks import Ranks
from ..runs.appearance import Appearance
from ..runs.folder import RunFolder
from ..runs.sheets import COLUMNS, ROWS, save_png, sheet_latents, training_sheet
from .progress import Progress
from .step import TrainStep


class Sheets:
    """Draws sheets of real, reconstructed and generated images into the run folder; on the first rank only."""

    def __init__(self, train: TrainConfig, step: TrainStep, loader: Loader, folder: RunFolder, ranks: Ranks) -> None:
        self._step, self._folder, self._ranks = step, folder, ranks
        self._drawn = False
        if ranks.first:
            count = COLUMNS * ROWS
            ids, _ = loader.order.place(torch.arange(count))
            self._real = normalize_images(loader.pixels(ids).to(step.device), margin=2 * train.jitter)
            self._z = sheet_latents(step.generator.config.latent, train.seed, count, step.device)

    def draw_if_due(self, progress: Progress) -> Appearance | None:
        """Write a sheet where one is due; returns the figures of its generated images."""
        return self.draw(progress.done) if progress.sheet_due and self._ranks.first else None

    def draw(self, step: int) -> Appearance:
        """Write the sheet of `step`; returns the figures of its generated images."""
        with self._ranks.patient(not self._drawn):  # kernels are chosen for the first one
            sheet, figures = training_sheet(self._step.average, self._step.discriminator, self._real, self._z)
            save_png(self._folder.sheet_file(step), sheet)
        self._drawn = True
        return figures
