"""Signs of trouble in a running training. A collapse is reported and never ends a run."""

from __future__ import annotations

from pathlib import Path

_STUCK_ROWS = 5  # log rows with k at 1 in a row before it is said
_FELL_TO = 0.5  # diversity under this share of its best counts as fallen
_ALIVE = 0.02  # chosen, not measured: far under the 0.386 that 256 of the portraits are apart
_PATIENCE = 0.5, 100_000  # share of the run, and images at most, within which samples must have begun to differ


def not_finite(step: int, dump: Path, run: Path, lr: float, *, alternating: bool) -> str:
    """What is said when a number of `step` is not finite; `dump` is the file about it, `lr` the rate it had."""
    kept = "G was not changed by it, nor D where it was D's" if alternating else "the weights were not changed by it"
    return (
        f"error: step {step:,} gave a loss, gradient or k that is not finite; {kept}. Its image ids and config are in "
        f"{dump}; go on from the last checkpoint, for instance with: fastbegan train --out {run} --lr {lr / 2:g}"
    )


class HealthMonitor:
    """Watches k and the diversity of the samples; each kind of trouble is reported once until it has passed."""

    def __init__(self) -> None:
        self._stuck, self._best, self._collapsed = 0, 0.0, False

    def after_log(self, k: float) -> str | None:
        """Take k of a log row; returns a message when it has just become stuck at 1."""
        self._stuck = self._stuck + 1 if k >= 1 else 0
        if self._stuck != _STUCK_ROWS:
            return None
        return "k is stuck at 1: D cannot tell generated images apart any more; try a lower gamma or learning rate"

    def after_sheet(self, diversity: float, images: int, fraction: float) -> str | None:
        """Take the diversity of a sheet's generated images; returns a message when they have just collapsed.

        `images` seen so far are this `fraction` of the run.
        """
        self._best = max(self._best, diversity)
        fell = self._best > _ALIVE and diversity < _FELL_TO * self._best
        share, most = _PATIENCE
        collapsed = fell or (self._best <= _ALIVE and (fraction >= share or images >= most))
        news = collapsed and not self._collapsed
        self._collapsed = collapsed
        if not news:
            return None
        detail = f"fell from {self._best:.3f}" if fell else f"never rose in {images:,} images"
        advice = "try a higher gamma or another seed" if fell else "try a longer run, a higher gamma or another seed"
        return f"the samples look alike (diversity {diversity:.3f}, {detail}); {advice}"
