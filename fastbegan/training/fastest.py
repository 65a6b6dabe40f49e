"""What a CPU trains fastest with, by a measurement of a few seconds: passes and precision."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from ..config import ModelConfig, TrainConfig
from ..counter import Z_D, latents
from ..device import has_native_bf16, pick_precision
from ..nets.models import build
from .cost import run_seconds, step_seconds
from .step import TrainStep

_PASSES = ("joint", "single-pass")  # that "auto" chooses from; the first where they are equally fast
_MARGIN = 0.95  # of the first candidate's time, from which on another is taken: noise must not choose
_SHORT = 60.0  # seconds of a run that would not gain what measuring takes
_BUDGET, _MOST = 3.0, 9  # seconds of all turns together, and their number
_LARGEST = 0.4  # seconds of a step; larger ones are measured with fewer images


@dataclass(frozen=True)
class Fastest:
    """The result of the measurement."""

    passes: str
    precision: str
    seconds: float
    """Of a step of the run, before compilation."""
    line: str
    """All that was measured, for a run's first lines."""


def fastest(model: ModelConfig, train: TrainConfig, device: torch.device, world: int = 1) -> Fastest | None:
    """Time a step of every candidate, turn by turn.

    Args:
        model: The nets.
        train: The run; "auto" in `passes` and `precision` opens them.
        device: A CPU.
        world: Number of ranks, which share a batch.

    Returns:
        The fastest, but the first candidate (joint, float32) unless another takes 5 % less. None where nothing is
        open, or the run is so short that it would not gain.
    """
    if "auto" not in (train.passes, train.precision, train.compile):
        return None
    predicted = step_seconds(model, train, device) / world
    if run_seconds(train, predicted) < _SHORT:
        return None
    passes = _PASSES if train.passes == "auto" else (train.passes,)
    precisions = ("float32", *(["bf16"] if has_native_bf16(device) else []))
    if train.precision != "auto":
        precisions = (train.precision,)
    share = train.batch_size / world
    images = max(1, int(min(share / train.accumulate, share * _LARGEST / predicted)))
    few = replace(train, batch_size=images, accumulate=1)
    candidates = {
        (way, precision): _step(model, replace(few, passes=way), precision, device)
        for precision in precisions
        for way in passes
    }
    for advance in candidates.values():
        advance()  # oneDNN prepares its kernels
    times: dict[tuple[str, str], list[float]] = {name: [] for name in candidates}
    start = time.perf_counter()
    for _ in range(_MOST):
        for name, advance in candidates.items():
            before = time.perf_counter()
            advance()
            times[name].append(time.perf_counter() - before)
        if time.perf_counter() - start > _BUDGET:
            break
    seconds = {name: statistics.median(values) * share / images for name, values in times.items()}
    first, best = next(iter(seconds)), min(seconds, key=lambda name: seconds[name])
    chosen = best if seconds[best] < _MARGIN * seconds[first] else first
    words = (f"{precision} {way} {1e3 * seconds[way, precision]:,.0f}" for way, precision in seconds)
    return Fastest(*chosen, seconds[chosen], f"{', '.join(words)} ms a step, before compilation")


def _step(model: ModelConfig, train: TrainConfig, precision: str, device: torch.device) -> Callable[[], None]:
    """One step on images of noise."""
    step = TrainStep(*build(model, seed=train.seed, device=device), train, pick_precision(precision, device)[1])
    shape = (train.batch_size, 3, model.size, model.size)
    real = torch.rand(shape, generator=torch.Generator().manual_seed(train.seed)).mul_(2).sub_(1)
    real = real.contiguous(memory_format=torch.channels_last)
    z = latents(train.seed, Z_D, 0, train.batch_size, model.latent, device)
    return lambda: step(real, z, z)
