"""Warnings about a training in progress: k stuck at 1, divergence, mode collapse. They never end a run."""

from __future__ import annotations

from pathlib import Path

_STUCK_ROWS = 5  # consecutive log rows with k at 1, or with L(x) far above its lowest, before a warning
_ROSE_TO = 2.0  # L(x) over this many times its lowest counts as divergence; chosen, not measured
_FELL_TO = 0.5  # variety under this share of its best counts as mode collapse
_ALIVE = 0.05  # variety of samples that differ; chosen, not measured
_PATIENCE = 0.5, 100_000  # share of the run, and number of images, by the first of which samples must differ


def not_finite(step: int, dump: Path, run: Path, lr: float, *, alternating: bool) -> str:
    """The message for a step with a number that is not finite.

    Args:
        step: Number of the step.
        dump: The file with the step's image ids and config.
        run: The run folder.
        lr: The learning rate that was asked for, halved or not since.
        alternating: Whether D is updated before G.

    Returns:
        What happened, which weights are unchanged, and how to continue.
    """
    unchanged = (
        "G was not changed by it, nor D where it was D's" if alternating else "the weights were not changed by it"
    )
    return (
        f"error: step {step:,} gave a loss, gradient or k that is not finite; {unchanged}. Its image ids and config "
        f"are in {dump}; go on from the last checkpoint, for instance with: fastbegan train --out {run} --lr {lr / 2:g}"
    )


class HealthMonitor:
    """Watches k, L(x) and the variety of samples. A warning comes once, and again only after its cause has passed."""

    def __init__(self) -> None:
        self._stuck, self._best, self._collapsed = 0, 0.0, False
        self._lowest, self._high = float("inf"), 0

    def after_log(self, k: float) -> str | None:
        """Take k of a log row. Returns a warning if k has just become stuck at 1."""
        self._stuck = self._stuck + 1 if k >= 1 else 0
        if self._stuck != _STUCK_ROWS:
            return None
        return "k is stuck at 1: D cannot tell generated images apart any more; try a lower gamma or learning rate"

    def after_loss(self, loss_real: float) -> str | None:
        """Take L(x) of a log row. Returns a warning if training has just diverged: D has lost what it had learned."""
        self._lowest = min(self._lowest, loss_real)
        self._high = self._high + 1 if loss_real > _ROSE_TO * self._lowest else 0
        if self._high != _STUCK_ROWS:
            return None
        return (
            f"training has diverged: L(x), which had fallen to {self._lowest:.3g}, is {loss_real:.3g}; "
            "start again with a lower learning rate (--lr)"
        )

    def after_sheet(self, variety: float, images: int, fraction: float) -> str | None:
        """Take the variety of a sheet's generated images.

        Args:
            variety: Distance between samples over that between real images, from `appearance.compare`.
            images: Images seen so far.
            fraction: Share of the run that is done, in [0, 1].

        Returns:
            A warning if mode collapse has just begun, else None.
        """
        self._best = max(self._best, variety)
        fell = self._best > _ALIVE and variety < _FELL_TO * self._best
        share, most = _PATIENCE
        collapsed = fell or (self._best <= _ALIVE and (fraction >= share or images >= most))
        news = collapsed and not self._collapsed
        self._collapsed = collapsed
        if not news:
            return None
        detail = f"fell from {self._best:.2f}" if fell else f"never rose in {images:,} images"
        advice = "try a higher gamma (at most 1), a lower learning rate or another seed"
        advice = advice if fell else advice.replace("try", "try a longer run,")
        return f"the samples look alike (variety {variety:.2f} of the data's, {detail}); {advice}"
