"""A study: one experiment at work, which trains runs, draws and scores images, and writes a report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..data.decode import Decoding
from ..data.prepare import load_images
from ..data.styles import STYLES, style_of
from ..device import core_count
from ..display import Display, duration
from ..evaluation.extractors import Extractor
from ..evaluation.scores import Yardstick, names
from ..files import write_json
from ..measure.machine import facts
from ..nets.models import Generator
from ..runs.folder import RunFolder
from ..runs.sheets import generate, sheet_latents
from ..version import __version__
from .page import Page
from .record import Record, Settings
from .scales import SCALES, Scale
from .training import Trained, Trainer

OF_ONE_RUN = ("continuity", "convergence", "scores", "nearest")
OF_MANY_SEEDS = ("diversity", "speed")
ALIKE = 0.1  # variety below which a note says that images are alike


class Study(Page):
    """One experiment at work. Started again in the same folder, it finds what it has finished."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        device: torch.device,
        extractor: Extractor | None,
        display: Display,
        lock: int | None = None,
        *,
        any_code: bool = False,
    ) -> None:
        """Start or resume an experiment.

        Args:
            settings: Its options.
            folder: Where all of it goes.
            device: The device that trains, draws and scores.
            extractor: The net whose features are compared; None where the experiment compares none.
            display: Where progress is shown.
            lock: Descriptor of the folder's lock, for the training runs.
            any_code: Also resume what other code, or another kind of device, has begun.

        Raises:
            UserError: The folder belongs to another experiment.
        """
        super().__init__(folder)
        self.settings, self.display, self.device = settings, display, device
        self.scale: Scale = SCALES[settings.scale]
        self.command = ""
        self.record = Record(folder, settings, device.type, display, any_code=any_code)
        self._trainer = Trainer(self.record, settings, device, lock)
        self._extractor = extractor
        self._yardstick: Yardstick | None = None
        self._shown: RunFolder | None = None  # the run whose settings the report names

    def measure(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Return the result of `compute`; see `Record.measure`."""
        return self.record.measure(name, compute)

    def train(self, options: Mapping[str, Sequence[object]], *, steps: int, may_fail: bool = False) -> list[Trained]:
        """Train a run per name; see `Trainer.train`."""
        runs = self._trainer.train(options, steps=steps, may_fail=may_fail)
        self.note_settings(runs[0].folder)
        return runs

    def train_one(self, name: str, options: Sequence[object] = ()) -> Trained:
        """Train one run, or take the one of --trained; see `Trainer.train_one`."""
        run = self._trainer.train_one(name, options)
        self.note_settings(run.folder)
        return run

    def note_settings(self, folder: RunFolder) -> None:
        """Take the run whose settings the report names."""
        self._shown = folder

    def draw(self, generator: Generator, count: int | None = None) -> np.ndarray:
        """Draw images from the same latents for every generator: uint8 [count, size, size, 3].

        The default count is the scale's.
        """
        count = self.scale.samples if count is None else count
        return generate(generator, sheet_latents(generator.config.latent, self.settings.seed, count, self.device))

    def generator(self, run: Trained) -> Generator:
        """Load the averaged generator of a run."""
        return run.folder.load_generator(self.device)

    def real(self, run: Trained) -> np.ndarray:
        """The training images of `run`, without the margin for jitter: uint8 [count, size, size, 3], a memory map."""
        config = run.folder.read_config()
        train, size = config.train, config.model.size
        stored = size + 2 * train.jitter
        images = load_images(
            train.data, stored, Decoding(train.crop, train.max_pixels), self.display.preparing, max_bad=train.max_bad
        ).images
        return images[:, train.jitter : train.jitter + size, train.jitter : train.jitter + size]

    def some_real(self, run: Trained, count: int) -> np.ndarray:
        """At most `count` training images of `run`, chosen by the seed: uint8 [n, size, size, 3]."""
        images = self.real(run)
        chosen = np.random.default_rng(self.settings.seed).permutation(len(images))[:count]
        return images[np.sort(chosen)]

    def unseen(self, run: Trained, count: int) -> np.ndarray | None:
        """Drawn images that `run` was not trained on: uint8 [count, size, size, 3]; None for other data."""
        config = run.folder.read_config()
        if (style := style_of(config.train.data)) is None:
            return None
        first = self.real(run).shape[0]
        return STYLES[style].draw(torch.arange(first, first + count), config.model.size).numpy()

    def score(self, images: np.ndarray, run: Trained, count: int | None = None) -> dict[str, Any]:
        """Score images against training images.

        Args:
            images: uint8 [N, size, size, 3].
            run: The run whose training images count; those of the first call serve the whole study.
            count: Number of training images, by default the scale's.

        Returns:
            The figures of `evaluation.scores.score`.
        """
        assert self._extractor is not None
        if self._yardstick is None:
            count = self.scale.samples if count is None else count
            self._yardstick = Yardstick(self.some_real(run, count), extractor=self._extractor)
        return self._yardstick.score(images)

    def about_scores(self, figures: Sequence[Mapping[str, Any]]) -> None:
        """Add to the report how `figures` were computed, and a note where precision or recall are 0 throughout."""
        assert self._extractor is not None
        first = figures[0]
        self.say(
            f"Figures are of {first['count']:,} images against {first['count_against']:,} training images, by features "
            f"of {self._extractor.weights}; it scales what it sees itself: {self._extractor.resize}. Of few images "
            "Frechet distances come out too high and inception scores too low; they compare with those of as many "
            "images only."
        )
        if len(figures) > 1 and all(row["recall"] == 0 for row in figures):
            nobody = "no training image lies among the features of images drawn"
            if all(row["precision"] == 0 for row in figures):
                self.note(f"precision and recall are 0 throughout and tell nothing: {nobody}, and none the other way")
            else:
                self.note(f"recall is 0 throughout and tells nothing: {nobody}")

    def note_alike(self, figures: Mapping[str, Mapping[str, Any]]) -> None:
        """Note the titles whose images are so alike that it may be mode collapse."""
        alike = [f"{title} ({row['variety']:.3f})" for title, row in figures.items() if row["variety"] < ALIKE]
        if alike:
            self.note(
                f"nearly alike are the images of {'; '.join(alike)}: their variety is under {ALIKE:g} of the data's. "
                "It may be a collapse or too short a run; these figures do not tell which"
            )

    @cached_property
    def names(self) -> dict[str, str]:
        """Names of the figures with this extractor."""
        assert self.settings.extractor is not None
        return names(self.settings.extractor)

    def finish(self, title: str, summary: str, results: dict[str, Any]) -> None:
        """Write report.md and results.json, and print the verdict of each check.

        Args:
            title: Headline of the report.
            summary: Paragraph below it: what the paper says.
            results: All figures, for results.json.
        """
        machine, seconds = facts(self.device), self.record.seconds
        content = {"command": self.command, "settings": dataclasses.asdict(self.settings), "seconds": round(seconds, 1)}
        content |= {"fastbegan": __version__, "machine": machine | {"cores": core_count()}}
        content |= {"checks": self.checks, "findings": self.findings, "results": results}
        write_json(self.folder / "results.json", content)
        measured = f"{machine['device']}, {machine['date']}, torch {machine['torch']}, {duration(seconds)} in all"
        self.write([f"# {title}", summary, f"```sh\n{self.command}\n```", f"Measured on {measured}."], self._limits())
        for check in self.checks:
            verdict = "holds" if check["holds"] else "DOES NOT HOLD"
            self.display.say(f"{verdict}: {check['expected']}; found: {check['found']}")
        self.display.say(str(self.folder / "report.md"))

    def _limits(self) -> Iterator[str]:
        """Sentences on what the figures do not show."""
        if self._shown is not None:
            config, rows = self._shown.read_config(), self._shown.read_metrics()
            model, train = config.model, config.train
            drawn = style_of(train.data)
            data = train.data if drawn else Path(train.data).name
            yield (
                f"Data {data}, {model.size} pixels, n = {model.filters}, {rows[-1]['step'] if rows else 0:,} steps of "
                f"{train.batch_size} images, precision {train.precision}."
            )
            if drawn:
                yield f"The {drawn} are drawn by a program and vary in fewer ways than photographs."
        if self.settings.trained is None or self.settings.scale == "smoke":
            yield self.scale.limits
        if self.settings.seeds in (None, 1):
            yield "One run for each setting: how far runs of other seeds would differ is not known."
        if len(self.record.makers) > 1:
            yield (
                "Several versions of the code, or kinds of device, have worked on this (study.json has them): figures "
                "of one table need not come from the same."
            )
