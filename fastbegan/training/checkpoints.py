"""Checkpoints of a running training: copied at once, written in the background."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from ..display import Display
from ..distributed.ranks import Ranks
from ..runs.checkpoint import Writer, copied, save_checkpoint
from ..runs.folder import RunFolder
from .progress import Progress
from .step import TrainStep

_LINGER = 15.0  # seconds that a checkpoint may still take when a rank was lost; torchrun waits 30


class Checkpoints:
    """Saves a run's state into its folder; of several ranks the first one, once all have the same weights."""

    def __init__(self, step: TrainStep, folder: RunFolder, display: Display, ranks: Ranks, *, keep: int) -> None:
        self._step, self._folder, self._display, self._ranks, self._keep = step, folder, display, ranks, keep
        self._writer = Writer()
        self.saved_step = -1

    def check(self) -> None:
        """Raise what went wrong so far."""
        self._writer.check()

    def linger(self) -> None:
        """Wait for a checkpoint that is being written, of several ranks a few seconds at most; raise nothing."""
        self._writer.linger(None if self._ranks.alone else _LINGER)

    def finish(self) -> None:
        """Wait until all is written."""
        with self._ranks.patient(self._writer.busy):  # slow storage is no reason to end the run
            self._writer.finish()

    def save_if_due(self, progress: Progress, state: Callable[[], dict[str, Any]]) -> None:
        """Save `state` where a checkpoint is due."""
        if progress.checkpoint_due and self.saved_step != progress.done:
            self.save(progress.done, state)

    def save(self, step: int, state: Callable[[], dict[str, Any]]) -> None:
        """Save `state` as the checkpoint of `step`. Raises RanksDifferError where the ranks' weights differ."""
        self._ranks.require_equal(self._step.fingerprint, f"step {step:,}", self._folder.path)
        self.saved_step = step
        if not self._ranks.first:
            return
        copy = copied(state())

        def write() -> None:
            self._folder.write_weights(copy["modules"])
            save_checkpoint(self._folder.checkpoints, step, copy, self._keep)
            self._folder.nonfinite_file.unlink(missing_ok=True)  # the run has passed that step

        if self._writer.busy:
            self._display.say(f"warning: step {step:,}: the checkpoint before is still being written; waiting for it")
        self.finish()
        self._writer.begin(write)
