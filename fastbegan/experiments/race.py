"""A run by its own clock: trained in turns, so that several share a machine fairly, and stopped while it is scored."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from ..display import Display
from ..distributed.stop import StopRequest
from ..errors import UserError
from ..measure.machine import synchronize
from ..runs.folder import RunConfig
from ..training.loop import Training

LOG_EVERY = 10  # steps of a row of metrics
SMOOTHED = 30  # rows of metrics of which M is the mean
QUIET = {"sample_every": 10**9, "checkpoint_every": 10**9}  # settings of a run that leaves nothing behind


@dataclass
class Racer:
    """A run, and its clock."""

    training: Training
    seconds: float
    """Of its own turns, and of its set-up."""
    clock: list[float] = field(default_factory=list)
    """Seconds after each step; on a GPU exact at the end of a turn, and where a row of metrics arrives."""

    @classmethod
    def set_up(cls, config: RunConfig, folder: Path, display: Display, closing: contextlib.ExitStack) -> Racer:
        """A new run in `folder`, whose content goes; `closing` ends what it holds open."""
        shutil.rmtree(folder, ignore_errors=True)  # of a race that was interrupted
        start = time.monotonic()
        training = Training(config, folder, resume=False, display=display)
        seconds = time.monotonic() - start
        closers = (training.loader.close, training.metrics.close, training.advance.close, training.checkpoints.linger)
        for close in closers:
            closing.callback(close)
        return cls(training, seconds)

    def turn(self, end: float) -> None:
        """Train at least a step, until the own clock shows `end` seconds or the run is over. Raises UserError."""
        training, stop, before = self.training, StopRequest(), self.seconds
        device = training.place.device
        synchronize(device)
        training.begin()
        start, first = time.monotonic(), True
        while not training.progress.last and (first or self.seconds < end):
            if not training.go_on(stop):
                raise UserError(
                    f"{training.folder.path} has a number that is not finite at step {len(self.clock) + 1:,}"
                )
            self.seconds, first = before + time.monotonic() - start, False
            self.clock.append(self.seconds)
        synchronize(device)
        self.seconds = self.clock[-1] = before + time.monotonic() - start

    def convergence(self) -> tuple[list[float], list[float]]:
        """Seconds and M of the rows of metrics so far."""
        self.training.metrics.catch_up(self.training.progress)
        rows = self.training.folder.read_metrics()
        return [round(self.clock[row["step"] - 1], 2) for row in rows], [row["convergence"] for row in rows]


def smoothed(values: Sequence[float], width: int = SMOOTHED) -> np.ndarray:
    """Mean of each value and the `width` - 1 before it, of fewer at the start."""
    sums = np.cumsum(np.concatenate(([0.0], values)))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - width, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)


def seconds_to(level: float, seconds: Sequence[float], values: Sequence[float]) -> float | None:
    """When `values`, smoothed, first were at most `level`; None for never."""
    reached = np.flatnonzero(smoothed(values) <= level)
    return float(seconds[reached[0]]) if len(reached) else None
