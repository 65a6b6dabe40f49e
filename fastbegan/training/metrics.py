"""Rows of metrics: read from the device without waiting for it, written to a file, loggers and the display."""

from __future__ import annotations

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from ..display import Display
from ..distributed.ranks import Ranks
from ..runs.appearance import Appearance
from ..runs.folder import RunFolder
from .health import HealthMonitor
from .loggers import Logger
from .progress import Progress
from .reading import Reading
from .step import TrainStep


class Metrics:
    """Logs a run. One row at a time is on its way from the device; of several ranks the first one writes."""

    def __init__(self, step: TrainStep, folder: RunFolder, display: Display, ranks: Ranks) -> None:
        self._step, self._folder, self._display, self._ranks = step, folder, display, ranks
        self._health = HealthMonitor()
        self._loggers: list[Logger] = []
        self._row: tuple[Reading, dict[str, Any]] | None = None  # on its way
        self._clock, self._images = time.monotonic(), 0  # of the row before
        self._waited = 0.0  # seconds for batches, since the row before

    def open(self, progress: Progress, loggers: list[Logger]) -> None:
        """Show the folder's earlier rows to the health monitor. The loggers get those that come."""
        self._loggers = loggers
        for row in self._folder.read_metrics():
            self._health.after_log(row["k"])
            self._health.after_loss(row["loss_real"])
            if "variety" in row:  # rows of earlier versions have none
                fraction = progress.fraction() * row["images"] / max(progress.images, 1)
                self._health.after_sheet(row["variety"], row["images"], fraction)

    def begin(self, progress: Progress) -> None:
        """Start the clock: this process trains from now on."""
        self._clock, self._images, self._waited = time.monotonic(), progress.images, 0.0

    def close(self, *, failed: bool = False) -> None:
        """No rows come any more; `failed` where the run ends by an error."""
        self._tell_loggers(lambda logger: logger.close(failed=failed))
        self._loggers.clear()

    def _tell_loggers(self, tell: Callable[[Logger], None]) -> None:
        """Call `tell` with each logger; one that raises gets nothing any more, for the run has its rows anyway."""
        self._loggers = [logger for logger in self._loggers if _told(logger, tell)]

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Time inside does not count: images per second are those of training."""
        before = time.monotonic()
        yield
        self._clock += time.monotonic() - before

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Time inside is spent waiting for a batch."""
        before = time.monotonic()
        yield
        self._waited += time.monotonic() - before

    def catch_up(self, progress: Progress) -> bool:
        """Write the pending row, if it arrived or this step waits anyway.

        Returns whether all numbers are finite so far.
        """
        finite = self._write(progress, wait=progress.log_due or progress.waits)
        return finite and not (progress.waits and bool(self._step.found_bad.item()))

    def log(self, progress: Progress, lr: float, looks: Appearance | None) -> bool:
        """Begin a row where one is due; `looks` is of a sheet of this step.

        Returns whether all numbers are finite so far.
        """
        if looks is not None:
            self._warn(self._health.after_sheet(looks.variety, progress.images, progress.fraction()), progress.done)
            file = self._folder.sheet_file(progress.done)
            self._tell_loggers(lambda logger: logger.sheet(progress.done, file))
        if progress.log_due:
            facts = {"step": progress.done, "images": progress.images, "lr": lr}
            facts |= {} if looks is None else dataclasses.asdict(looks)
            self._row = self._step.begin_reading(), facts
        else:
            self._display.step(progress.fraction(), progress.done, progress.seconds_left())
        return self._write(progress, wait=progress.waits)

    def _write(self, progress: Progress, *, wait: bool) -> bool:
        """Write the pending row, if it arrived or `wait`; False if its numbers are not finite."""
        # several ranks look at the same step, not whenever a row has arrived
        if self._row is None or not (wait or (self._ranks.alone and self._row[0].arrived())):
            return True
        (reading, facts), self._row = self._row, None
        *numbers, found_bad = reading.values()
        if found_bad or not self._ranks.first:
            return not found_bad
        now, step, images = time.monotonic(), facts.pop("step"), facts.pop("images")
        seconds = max(now - self._clock, 1e-9)
        rate, waited = (images - self._images) / seconds, min(1.0, self._waited / seconds)
        self._clock, self._images, self._waited = now, images, 0.0
        row = {"step": step, "images": images, **self._step.equilibrium.means(numbers)}
        row |= {"lr": facts.pop("lr"), "images_per_second": round(rate, 2), "data_wait": round(waited, 4), **facts}
        self._warn(self._health.after_log(row["k"]), step)
        self._warn(self._health.after_loss(row["loss_real"]), step)
        self._folder.append_metrics(row)
        self._tell_loggers(lambda logger: logger.row(row))
        self._display.training(progress.fraction(), row, progress.seconds_left())
        return True

    def _warn(self, message: str | None, step: int) -> None:
        if message:
            self._display.say(f"warning: step {step:,}: {message}")


def _told(logger: Logger, tell: Callable[[Logger], None]) -> bool:
    """Whether `tell` took place; a warning says why not."""
    try:
        tell(logger)
    except Exception as error:  # of many types
        name = type(logger).__name__.lower()
        warnings.warn(f"{name} failed, going on without it: {type(error).__name__} {error}", stacklevel=4)
        return False
    return True
