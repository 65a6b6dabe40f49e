"""How far a run is, what is due after a step, and when it ends."""

from __future__ import annotations

import time
from typing import Any

from ..config import TrainConfig
from ..distributed.ranks import Ranks
from ..distributed.stop import StopRequest
from .reading import Reading
from .step import TrainStep

_UNSTEADY = 10  # first steps of a process, which compile and choose kernels


class Progress:
    """Steps, images and seconds of a run, resumed runs included; `last` says whether the step just done is the last."""

    def __init__(self, train: TrainConfig, step: TrainStep, ranks: Ranks) -> None:
        self.done, self.images, self.seconds = 0, 0, 0.0
        self.last = False
        self._train, self._step, self._ranks = train, step, ranks
        self._wishes: Reading | None = None  # of all ranks in the step before
        self._clock = time.monotonic()
        self._begun = 0  # the steps that were done when this process began
        self._steady: tuple[float, float] | None = None  # fraction and seconds, once steps take their usual time

    def begin(self) -> None:
        """Start the clock: this process trains from now on."""
        self._clock = time.monotonic()
        self._begun = self.done
        self.last = self.fraction() >= 1

    def count(self) -> None:
        """A step is done."""
        self.done, self.images = self.done + 1, self.images + self._train.batch_size

    def decide(self, stop: StopRequest) -> None:
        """Set `last`, once per step: a signal that comes later is for the next step. All ranks decide alike."""
        now = time.monotonic()
        self.seconds, self._clock = self.seconds + now - self._clock, now
        if self.done == self._begun + _UNSTEADY:
            self._steady = self.fraction(), self.seconds
        self.last = self._reached(stop)

    def _reached(self, stop: StopRequest) -> bool:
        wish = stop.signal is not None or self.fraction() >= 1
        if self._ranks.alone:
            return wish
        # ranks must stop together: a wish is summed with the next step's losses and read one step later
        self._step.wish.fill_(wish)
        before, self._wishes = self._wishes, Reading(self._step.wished[None])
        # minutes do not count here: clocks differ between ranks
        return self.counted_fraction() >= 1 or (before is not None and before.values()[0] > 0)

    def fraction(self) -> float:
        """Share of the run that is done, by the total that is nearest."""
        return self._fraction(self._train.minutes)

    def counted_fraction(self) -> float:
        """The same by images and steps, so equal on all ranks and machines; 0 where only minutes are given."""
        return self._fraction(None)

    def _fraction(self, minutes: float | None) -> float:
        train = self._train
        totals = ((self.images, train.images), (self.done, train.steps), (self.seconds / 60, minutes))
        return max((now / total for now, total in totals if total is not None), default=0.0)

    def seconds_left(self) -> float | None:
        """Seconds until the end at this process's mean speed; None in its first steps, which tell nothing of it."""
        if self._steady is None or self.fraction() <= self._steady[0]:
            return None
        fraction, seconds = self._steady
        return max(0.0, (1 - self.fraction()) * (self.seconds - seconds) / (self.fraction() - fraction))

    def due(self, every: int) -> bool:
        """True after every `every` steps, and after the last."""
        return self.last or self.done % every == 0

    @property
    def log_due(self) -> bool:
        """Whether a row of metrics begins."""
        return self.due(self._train.log_every)

    @property
    def sheet_due(self) -> bool:
        """Whether a sample sheet is drawn; the first is early, for a person who waits for it."""
        return self.due(self._train.sample_every) or self.done == self._train.log_every

    @property
    def checkpoint_due(self) -> bool:
        """Whether a checkpoint is written."""
        return self.due(self._train.checkpoint_every)

    @property
    def waits(self) -> bool:
        """Whether this step waits for the device anyway."""
        return self.sheet_due or self.checkpoint_due

    def state(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"step": self.done, "images": self.images, "seconds": self.seconds}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from a checkpoint."""
        self.done, self.images, self.seconds = state["step"], state["images"], state["seconds"]
