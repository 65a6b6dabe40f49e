"""What all experiments share: a folder in which runs are trained, figures kept as they come, and a report written."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastbegan_kernels

from ..data.faces import faces
from ..data.prepare import load_images
from ..display import Display, duration
from ..errors import UserError
from ..evaluation.extractors import Extractor
from ..evaluation.scores import Yardstick, names
from ..files import make_folder, read_json, write_json
from ..measure.machine import facts
from ..nets.models import Generator
from ..runs.folder import RunFolder
from ..runs.sheets import generate, sheet_latents
from ..training.loop import NOT_FINITE
from ..version import __version__
from .page import Page
from .scales import SCALES, Scale

FILE = "study.json"  # what this is, and for how long it has been going on
OF_ONE_RUN = ("continuity", "convergence", "scores")
ALIKE = 0.1  # images with less than this share of the data's diversity are said to be
_STOPPED = 75  # exit code of a run that a signal ended
_POLL, _TELL = 0.2, 30.0  # seconds


@dataclass(frozen=True)
class Settings:
    """What was asked for; a folder is continued with the same only."""

    name: str
    scale: str
    data: str | None
    """None where `trained` is given, which knows its data."""
    trained: str | None
    weights: str | None
    """SHA-256 of the generator of `trained`."""
    seed: int
    seeds: int | None
    """Of `diversity`; None for the others."""
    extractor: str | None
    """None for `continuity`."""


@dataclass(frozen=True)
class Trained:
    """A run of an experiment. `finite` is False for one that a number ended which was not finite."""

    name: str
    folder: RunFolder
    finite: bool = True

    def last(self) -> dict[str, float]:
        """Means over the last tenth of the rows of metrics, `ratio` of the losses', and `k_max` over all rows."""
        rows = self.folder.read_metrics()
        few = rows[-max(1, len(rows) // 10) :]
        last = {name: _mean(few, name) for name in ("loss_real", "loss_fake", "k", "convergence")}
        return last | {"ratio": last["loss_fake"] / last["loss_real"], "k_max": max(row["k"] for row in rows)}

    def thirds(self) -> dict[str, float]:
        """Means of M over the second third of the rows and over the last."""
        rows = self.folder.read_metrics()
        third = max(1, len(rows) // 3)
        return {
            "second_third_M": _mean(rows[third : 2 * third] or rows, "convergence"),
            "last_third_M": _mean(rows[-third:], "convergence"),
        }


class Study(Page):
    """One experiment at work. What it has finished is found again when it is started once more."""

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
        """The runs hold `lock` too, so that none is left alone in the folder.

        Raises UserError for another's folder; `any_code` goes on with what other code, or another device, has made.
        """
        super().__init__(folder)
        self.settings, self.display, self.device = settings, display, device
        self.scale: Scale = SCALES[settings.scale]
        self.command = ""
        self._extractor, self._lock = extractor, lock
        self._yardstick: Yardstick | None = None
        self._shown: RunFolder | None = None
        self._begun = time.monotonic()
        self._file = folder / FILE
        self._seconds = 0.0
        makers = [{"fastbegan": __version__, "code": fingerprint(), "device": device.type}]
        asked = {"settings": dataclasses.asdict(settings), "scale": dataclasses.asdict(self.scale), "made_by": makers}
        self._asked: dict[str, Any] = json.loads(json.dumps(asked))
        if self._file.exists():
            stored = read_json(self._file)
            if any_code:
                earlier = stored.get("made_by") or []
                self._asked["made_by"] = earlier if makers[0] in earlier else [*earlier, *makers]
                stored["made_by"] = self._asked["made_by"]
            for part, words, more in (
                ("settings", "settings", ""),
                ("scale", "lengths", ""),
                ("made_by", "code or device", ", or go on with --any-code"),
            ):
                if stored.get(part) != self._asked[part]:
                    raise UserError(
                        f"{folder} holds an experiment with other {words}; remove it or give another --out{more}"
                    )
            self._seconds = float(stored.get("seconds", 0.0))
        make_folder(folder / "measures")
        make_folder(folder / "runs")
        self.save()

    def save(self) -> None:
        """Write down for how long this has been going on."""
        write_json(self._file, {**self._asked, "seconds": self.seconds})

    @property
    def seconds(self) -> float:
        """Over all sittings."""
        return self._seconds + time.monotonic() - self._begun

    def measure(self, name: str, compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `compute` returns, from its file where it was computed before."""
        path = self.folder / "measures" / f"{name}.json"
        if not path.exists():
            begun = time.monotonic()
            write_json(path, compute())
            self.save()
            self.display.say(f"{name}: {duration(time.monotonic() - begun)}")
        return read_json(path)

    # training

    def train(self, wanted: Mapping[str, Sequence[object]], *, steps: int, may_fail: bool = False) -> list[Trained]:
        """Train a run for each name with these options, as many at once as there are cores (on a GPU one).

        Raises UserError for a run that fails; one that ends because a number is not finite may, with `may_fail`.
        """
        jobs = 1 if self.device.type == "cuda" else min(_cores(), len(wanted))
        waiting = {name: self._command(name, options, steps) for name, options in wanted.items()}
        active: dict[str, subprocess.Popen[bytes]] = {}
        codes: dict[str, int] = {}
        for name in list(waiting):
            if self._outcome(name).exists():
                codes[name] = read_json(self._outcome(name))["code"]
                del waiting[name]
        told = time.monotonic()
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    name = next(iter(waiting))
                    active[name] = self._start(name, waiting.pop(name), jobs)
                for name in [name for name, process in active.items() if process.poll() is not None]:
                    codes[name] = self._ended(name, active.pop(name).returncode, steps, may_fail)
                if time.monotonic() - told > _TELL:
                    told = time.monotonic()
                    self.save()
                    self.display.say(f"{', '.join(self._progress(active, steps))}; {len(waiting)} more runs to come")
                time.sleep(_POLL)
        finally:
            for process in active.values():
                process.send_signal(signal.SIGTERM)  # it writes a checkpoint
            for process in active.values():
                process.wait()
        runs = [Trained(name, self._run(name), codes[name] == 0) for name in wanted]
        self._shown = runs[0].folder
        return runs

    def train_one(self, name: str, options: Sequence[object] = ()) -> Trained:
        """The run that --trained names, or one that is trained now, for the scale's full length."""
        if self.settings.trained is not None:
            self._shown = RunFolder(Path(self.settings.trained))
            return Trained(name, self._shown)
        return self.train({name: options}, steps=self.scale.steps)[0]

    def _run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def _outcome(self, name: str) -> Path:
        return self.folder / "measures" / f"run-{name}.json"

    def _command(self, name: str, options: Sequence[object], steps: int) -> list[str]:
        settings = self.settings
        usual = {"--preset": self.scale.preset, "--seed": settings.seed}
        chosen = [part for option, value in usual.items() if option not in options for part in (option, value)]
        always = ("--data", settings.data, "--device", self.device, "--steps", steps, "--out", self._run(name).path)
        every = [*chosen, *self.scale.options, *options, *always, "--requeue-code", _STOPPED]
        return [sys.executable, "-m", "fastbegan", "train", *map(str, every)]

    def _start(self, name: str, command: list[str], jobs: int) -> subprocess.Popen[bytes]:
        self.display.say(f"training {name}: fastbegan {shlex.join(command[3:])}")
        # not all cores for one run: those beyond half bring little, and cost much on a machine that is shared
        threads = {"OMP_NUM_THREADS": str(max(1, _cores() // max(jobs, 2)))}
        with (self.folder / "runs" / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, env=os.environ | threads,
                start_new_session=True,  # a Ctrl-C in the terminal reaches it through this process, once
                pass_fds=() if self._lock is None else (self._lock,),
            )  # fmt: skip

    def _ended(self, name: str, code: int, steps: int, may_fail: bool) -> int:
        log = self.folder / "runs" / f"{name}.log"
        if code == _STOPPED:
            raise UserError(f"run {name} was told to stop before its {steps:,} steps; start this again to go on")
        if code != 0 and not (may_fail and code == NOT_FINITE):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            raise UserError(f"run {name} ended with exit code {code} ({lines[-1].strip()}); all it said is in {log}")
        rows = self._run(name).read_metrics()
        rate = f", {rows[-1]['images_per_second']:g} images/s at its end" if rows else ""
        write_json(self._outcome(name), {"code": code})
        self.display.say(f"trained {name}" + (rate if code == 0 else ": a number was not finite"))
        return code

    def _progress(self, active: Mapping[str, object], steps: int) -> Iterator[str]:
        for name in active:
            rows = self._run(name).read_metrics()
            yield f"{name} {rows[-1]['step'] if rows else 0:,} of {steps:,} steps"

    # images and their scores

    def draw(self, generator: Generator, count: int | None = None) -> np.ndarray:
        """Images of the scale's number of latents, the same for every generator: uint8 [count, size, size, 3]."""
        count = self.scale.samples if count is None else count
        return generate(generator, sheet_latents(generator.config.latent, self.settings.seed, count, self.device))

    def generator(self, run: Trained) -> Generator:
        """The averaged generator of a run."""
        return run.folder.load_generator(self.device)

    def real(self, run: Trained) -> np.ndarray:
        """What `run` was trained on: uint8 [count, size, size, 3], a memory map; the middle of what jitter shifts."""
        config = run.folder.read_config()
        train, size = config.train, config.model.size
        stored = size + 2 * train.jitter
        images = load_images(train.data, stored, train.crop, self.display.preparing, max_bad=train.max_bad).images
        return images[:, train.jitter : train.jitter + size, train.jitter : train.jitter + size]

    def some_real(self, run: Trained, count: int) -> np.ndarray:
        """So many of them, chosen by the seed."""
        images = self.real(run)
        chosen = np.random.default_rng(self.settings.seed).permutation(len(images))[:count]
        return images[np.sort(chosen)]

    def unseen(self, run: Trained, count: int) -> np.ndarray | None:
        """Portraits, uint8 [count, size, size, 3], that `run` was not trained on; None where it was on other data."""
        config = run.folder.read_config()
        if config.train.data.partition(":")[0] != "faces":
            return None
        first = self.real(run).shape[0]
        return faces(torch.arange(first, first + count), config.model.size).numpy()

    def score(self, images: np.ndarray, run: Trained, count: int | None = None) -> dict[str, Any]:
        """Figures of `images`, as `evaluate.score`, against `count` that `run` was trained on; of one set a study."""
        assert self._extractor is not None
        if self._yardstick is None:
            count = self.scale.samples if count is None else count
            self._yardstick = Yardstick(self.some_real(run, count), extractor=self._extractor)
        return self._yardstick.score(images)

    def about_scores(self, figures: Sequence[Mapping[str, Any]]) -> None:
        """Say what has to be known to read them."""
        assert self._extractor is not None
        one = figures[0]
        self.say(
            f"Figures are of {one['count']:,} images against {one['count_against']:,} training images, by features of "
            f"{self._extractor.weights}; it scales what it sees itself: {self._extractor.resize}. Of few images "
            "Frechet distances come out too high and inception scores too low; they compare with those of as many "
            "images only."
        )
        if len(figures) > 1 and all(one["recall"] == 0 for one in figures):
            nobody = "no training image lies among the features of images drawn"
            if all(one["precision"] == 0 for one in figures):
                self.note(f"precision and recall are 0 throughout and tell nothing: {nobody}, and none the other way")
            else:
                self.note(f"recall is 0 throughout and tells nothing: {nobody}")

    def note_alike(self, figures: Mapping[str, Mapping[str, Any]]) -> None:
        """Note which of these, by title, are so alike that it may be a collapse."""
        alike = [
            f"{title} ({one['diversity']:.3f})"
            for title, one in figures.items()
            if one["diversity"] < ALIKE * one["diversity_against"]
        ]
        if alike:
            of_data = next(iter(figures.values()))["diversity_against"]
            self.note(
                f"nearly alike are the images of {'; '.join(alike)}: their diversity is under a tenth of the training "
                f"images' {of_data:.3f}. It may be a collapse or too short a run; these figures do not tell which"
            )

    @cached_property
    def names(self) -> dict[str, str]:
        """What the figures are called with this extractor."""
        assert self.settings.extractor is not None
        return names(self.settings.extractor)

    def finish(self, title: str, summary: str, results: dict[str, Any]) -> None:
        """Write report.md and results.json."""
        machine = facts(self.device)
        written = {
            "command": self.command, "settings": dataclasses.asdict(self.settings), "seconds": round(self.seconds, 1),
            "fastbegan": __version__, "machine": machine | {"cores": _cores()}, "checks": self.checks,
            "findings": self.findings, "results": results,
        }  # fmt: skip
        write_json(self.folder / "results.json", written)
        measured = f"{machine['device']}, {machine['date']}, torch {machine['torch']}, {duration(self.seconds)} in all"
        self.write([f"# {title}", summary, f"```sh\n{self.command}\n```", f"Measured on {measured}."], self._limits())
        for one in self.checks:
            verdict = "holds" if one["holds"] else "DOES NOT HOLD"
            self.display.say(f"{verdict}: {one['expected']}; found: {one['found']}")
        self.display.say(str(self.folder / "report.md"))

    def _limits(self) -> Iterator[str]:
        if self._shown is not None:
            config, rows = self._shown.read_config(), self._shown.read_metrics()
            model, train = config.model, config.train
            data = train.data if train.data.partition(":")[0] == "faces" else Path(train.data).name
            yield (
                f"Data {data}, {model.size} pixels, n = {model.filters}, {rows[-1]['step'] if rows else 0:,} steps of "
                f"{train.batch_size} images, precision {train.precision}."
            )
            if train.data.partition(":")[0] == "faces":
                yield "The portraits are drawn by a program and vary in fewer ways than photographs."
        if self.settings.trained is None or self.settings.scale == "smoke":
            yield self.scale.limits
        if self.settings.seeds in (None, 1):
            yield "One run for each setting: how far runs of other seeds would differ is not known."
        if len(self._asked["made_by"]) > 1:
            yield (
                "Several versions of the code, or kinds of device, have worked on this (study.json has them): figures "
                "of one table need not come from the same."
            )


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def fingerprint() -> str:
    """Of all code that figures may depend on."""
    digest = hashlib.sha256()
    for package in (Path(fastbegan_kernels.__file__).parent, Path(__file__).parents[1]):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
