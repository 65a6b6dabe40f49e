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
from PIL import Image

import fastbegan_kernels

from .. import __version__
from ..bench.machine import facts
from ..data.prepare import load_images
from ..errors import UserError
from ..evaluate import Yardstick, names
from ..extractors import Extractor
from ..files import atomic, make_folder, read_json, write_json
from ..models import Generator
from ..report import Report, duration
from ..run import RunFolder
from ..samples import generate, save_png, sheet_latents
from ..train import NOT_FINITE
from .scales import SCALES, Scale

FILE = "study.json"  # what this is, and for how long it has been going on
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
    seeds: int
    extractor: str


@dataclass(frozen=True)
class Trained:
    """A run of an experiment. `finite` is False for one that a number ended which was not finite."""

    name: str
    folder: RunFolder
    finite: bool = True

    def last(self) -> dict[str, float]:
        """Means over the last tenth of the rows of metrics."""
        rows = self.folder.read_metrics()
        rows = rows[-max(1, len(rows) // 10) :]
        return {name: _mean(rows, name) for name in ("loss_real", "loss_fake", "k", "convergence")}

    def first(self) -> dict[str, float]:
        """Mean of M over the first tenth."""
        rows = self.folder.read_metrics()
        return {"first_M": _mean(rows[: max(1, len(rows) // 10)], "convergence")}


class Study:
    """One experiment at work. What it has finished is found again when it is started once more."""

    def __init__(
        self,
        settings: Settings,
        folder: Path,
        device: torch.device,
        extractor: Extractor | None,
        report: Report,
        lock: int | None = None,
    ) -> None:
        """The runs hold `lock` too, so that none is left alone in the folder. Raises UserError for another's folder."""
        self.settings, self.folder, self.report, self.device = settings, folder, report, device
        self.scale: Scale = SCALES[settings.scale]
        self.command = ""
        self._extractor, self._lock = extractor, lock
        self._yardstick: Yardstick | None = None
        self._text: list[str] = []
        self._checks: list[dict[str, Any]] = []
        self._begun = time.monotonic()
        self._file = folder / FILE
        self._seconds = 0.0
        made_by = {"fastbegan": __version__, "code": _fingerprint(), "device": device.type}
        asked = {"settings": dataclasses.asdict(settings), "scale": dataclasses.asdict(self.scale), "made_by": made_by}
        self._asked: dict[str, Any] = json.loads(json.dumps(asked))
        if self._file.exists():
            stored = read_json(self._file)
            for part, words in (("settings", "settings"), ("scale", "lengths"), ("made_by", "code or device")):
                if stored.get(part) != self._asked[part]:
                    raise UserError(f"{folder} holds an experiment with other {words}; remove it or give another --out")
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
            self.report.say(f"{name}: {duration(time.monotonic() - begun)}")
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
                    self.report.say(f"{', '.join(self._progress(active, steps))}; {len(waiting)} more runs to come")
                time.sleep(_POLL)
        finally:
            for process in active.values():
                process.send_signal(signal.SIGTERM)  # it writes a checkpoint
            for process in active.values():
                process.wait()
        return [Trained(name, self._run(name), codes[name] == 0) for name in wanted]

    def train_one(self, name: str, options: Sequence[object] = ()) -> Trained:
        """The run that --trained names, or one that is trained now, for the scale's full length."""
        if self.settings.trained is not None:
            return Trained(name, RunFolder(Path(self.settings.trained)))
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
        self.report.say(f"training {name}: fastbegan {shlex.join(command[3:])}")
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
        self.report.say(f"trained {name}" + (rate if code == 0 else ": a number was not finite"))
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
        images = load_images(train.data, stored, train.crop, self.report.preparing, max_bad=train.max_bad).images
        return images[:, train.jitter : train.jitter + size, train.jitter : train.jitter + size]

    def some_real(self, run: Trained, count: int) -> np.ndarray:
        """So many of them, chosen by the seed."""
        images = self.real(run)
        chosen = np.random.default_rng(self.settings.seed).permutation(len(images))[:count]
        return images[np.sort(chosen)]

    def score(self, images: np.ndarray, run: Trained) -> dict[str, Any]:
        """Figures of `images`, as `evaluate.score`, against what `run` was trained on; of one data set a study."""
        assert self._extractor is not None
        if self._yardstick is None:
            self._yardstick = Yardstick(self.some_real(run, self.scale.samples), extractor=self._extractor)
        return self._yardstick.score(images)

    def about_scores(self) -> str:
        """What has to be known to read them."""
        assert self._extractor is not None
        return (
            f"Figures are of {self.scale.samples:,} images against as many training images, by features of "
            f"{self._extractor.weights}; it scales what it sees itself: {self._extractor.resize}. Of few images "
            "Frechet distances come out too high; they compare with those of as many images only."
        )

    @cached_property
    def names(self) -> dict[str, str]:
        """What the figures are called with this extractor."""
        return names(self.settings.extractor)

    # the report

    def say(self, *paragraphs: str) -> None:
        """Add text to the report."""
        self._text += [paragraph.strip() for paragraph in paragraphs]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; floats are shown with three digits."""
        lines = [head, ["---"] * len(head), *rows]
        self._text.append("\n".join(f"| {' | '.join(map(_shown, line))} |" for line in lines))

    def picture(self, name: str, picture: np.ndarray | Image.Image, caption: str) -> None:
        """Write NAME.png and show it in the report."""
        save_png(self.folder / f"{name}.png", picture)
        self.show(f"{name}.png", caption)

    def show(self, file: str, caption: str) -> None:
        """Show a file of the folder in the report."""
        self._text += [f"![{caption}]({file})", f"*{caption}*"]

    def check(self, expected: str, found: str, holds: bool) -> None:
        """Something the paper leads one to expect, and whether it is so."""
        self._checks.append({"expected": expected, "found": found, "holds": bool(holds)})

    def finish(self, title: str, summary: str, results: dict[str, Any]) -> None:
        """Write report.md and results.json."""
        machine = facts(self.device)
        written = {
            "command": self.command, "settings": dataclasses.asdict(self.settings), "seconds": round(self.seconds, 1),
            "fastbegan": __version__, "machine": machine | {"cores": _cores()}, "checks": self._checks,
            "results": results,
        }  # fmt: skip
        write_json(self.folder / "results.json", written)
        measured = f"{machine['device']}, {machine['date']}, torch {machine['torch']}, {duration(self.seconds)} in all"
        lines = [f"# {title}", summary, f"```sh\n{self.command}\n```", f"Measured on {measured}.", *self._text]
        if self._checks:
            lines.append("## What was expected")
            self._text = []
            rows = [(one["expected"], one["found"], "yes" if one["holds"] else "**no**") for one in self._checks]
            self.table(("expected", "found", "holds"), rows)
            lines += self._text
        lines += ["## Limits", self.scale.limits]
        with atomic(self.folder / "report.md") as file:
            file.write(("\n\n".join(lines) + "\n").encode())
        for one in self._checks:
            self.report.say(f"{'holds' if one['holds'] else 'DOES NOT HOLD'}: {one['expected']}; found: {one['found']}")
        self.report.say(str(self.folder / "report.md"))


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "not a number" if value != value else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")  # else it would end the cell


def _fingerprint() -> str:
    """Of all code that figures may depend on."""
    digest = hashlib.sha256()
    for package in (Path(fastbegan_kernels.__file__).parent, Path(__file__).parents[1]):
        for path in sorted(package.rglob("*.py")):
            digest.update(path.read_bytes())
    return digest.hexdigest()[:20]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
