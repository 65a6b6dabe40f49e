"""`fastbegan bench record`."""

from __future__ import annotations

import contextlib
import copy
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from ..counter import chosen
from ..data.decode import Decoding
from ..data.prepare import load_images
from ..device import pick_device
from ..display import Display, duration
from ..errors import UserError
from ..evaluation.scores import Yardstick
from ..experiments.race import LOG_EVERY, QUIET, Racer, seconds_to, smoothed
from ..measure.machine import facts
from ..runs.folder import RunConfig, settings_of
from ..runs.sheets import generate, sheet_latents

_LOOKS = 12  # evenly spaced times at which the images of a run are scored
_IMAGES = 500  # that are scored, and training images that they are compared with

LEVELS = {"demo": (0.04, 650.0)}
"""M and FD to which the minutes of a record lead."""
COLUMNS = ("device", "date", "commit", "torch", "M", "minutes", "FD", "minutes", "images/s", "command")


@dataclass(frozen=True)
class BenchRecord:
    """Train a preset from nothing, and print a row for the table of records: minutes until M and FD are low enough."""

    preset: str = "demo"
    """What is trained: demo, whose levels are fixed, or any other with levels of yours."""
    m: float | None = None
    """The level of M, a mean over 300 steps. Default: the fixed one."""
    fd: float | None = None
    """The level of FD, by EfficientNet-Lite0, of 500 images. Default: the fixed one."""
    seed: int = 0
    """Of the run."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def run(self) -> int:
        return bench_record(self)


def bench_record(options: BenchRecord) -> int:
    """Train until both levels are reached, or to the end; print the row; returns the exit code. Raises UserError."""
    fixed = LEVELS.get(options.preset, (None, None))
    m, fd = (given if given is not None else level for given, level in zip((options.m, options.fd), fixed, strict=True))
    if m is None or fd is None:
        raise UserError(f"preset is {options.preset!r}; accepted: {', '.join(LEVELS)}, or another with --m and --fd")
    start = settings_of(options.preset)
    device, _ = pick_device(options.device)
    train = replace(start.train, device=options.device, seed=options.seed, log_every=LOG_EVERY, log="", **QUIET)
    model = start.model
    with Display() as display, Display(quiet=True) as quiet, contextlib.ExitStack() as closing:
        real = load_images(train.data, model.size, Decoding(train.crop, train.max_pixels), display.preparing).images
        yardstick = Yardstick(real[chosen(len(real), _IMAGES, 0)], device=device, progress=display.preparing)
        folder = Path(closing.enter_context(tempfile.TemporaryDirectory())) / "run"
        racer = Racer.set_up(RunConfig(start.preset, model, train), folder, quiet, closing)
        training = racer.training
        display.say(f"{training.step.describe()}; {training.place.compile_line}; until M is {m:g} and FD {fd:g}")
        z = sheet_latents(model.latent, options.seed, _IMAGES, device)
        to_m, to_fd, look = None, None, 0
        while look < _LOOKS and None in (to_m, to_fd):
            look += 1
            while training.progress.fraction() < look / _LOOKS:
                racer.turn(racer.seconds + 1)
            seconds, convergence = racer.convergence()
            to_m = seconds_to(m, seconds, convergence)
            generator = copy.deepcopy(training.step.average).eval()
            distance = yardstick.score(generate(generator, z))["frechet_distance"]
            if distance <= fd and to_fd is None:
                to_fd = racer.seconds
            last = smoothed(convergence)[-1] if convergence else np.nan
            display.say(f"{duration(racer.seconds)}  M {last:.4f}  FD {distance:.0f}")
        machine = facts(device)
        made = f"fastbegan bench record --preset {options.preset} --m {m:g} --fd {fd:g} --seed {options.seed}"
        row = (
            machine["device"], machine["date"], machine["commit"] or "?", machine["torch"], f"{m:g}", _minutes(to_m),
            f"{fd:g}", _minutes(to_fd), f"{training.progress.images / racer.seconds:,.0f}", f"`{made}`",
        )  # fmt: skip
        for line in (COLUMNS, ["---"] * len(COLUMNS), row):
            print(f"| {' | '.join(line)} |")
    return 0


def _minutes(seconds: float | None) -> str:
    return "not reached" if seconds is None else f"{seconds / 60:.2f}"
