"""The measurement of `fastbegan bench step`: all modes of a training step, timed turn by turn in one run."""

from __future__ import annotations

import dataclasses
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastbegan_kernels.faults import is_out_of_memory

from ..config import ModelConfig, TrainConfig
from ..counter import Z_D, latents
from ..device import pick_precision, set_backends
from ..errors import UserError
from ..nets.models import build
from ..training.cost import step_cost
from ..training.graph import GraphedStep
from ..training.objective import OBJECTIVES
from ..training.step import FIRST_LOSS_SCALE, TrainStep
from .machine import synchronize
from .results import ratio

MODES = ("textbook", "single-pass", "joint", "alternating")
COMPILED = "+compile"
DEFAULT_MODES = ("textbook", f"textbook{COMPILED}", *MODES[1:], f"single-pass{COMPILED}")
# relative distance from the textbook's gradients above which a mode is refused; rounding flips the signs of some errors
_TOLERANCE = {"float32": 5e-3, "tf32": 2e-2, "bf16": 2e-1, "fp16": 2e-1}
_FIRST_STEPS = 5  # before timing; the fourth captures the CUDA graph
_GPU_STEPS = 5  # steps of a turn on a GPU, so that its queue never runs dry


@dataclass
class Row:
    """One mode in one precision; a ratio says how many times as fast it is, None where the other was not measured."""

    mode: str
    precision: str
    ms: float
    images_per_second: float
    flops: int
    peak_bytes: int
    """Measured on a GPU, else modelled."""
    ratio_eager: float | None = None
    """To the eager textbook step in the same precision, in its faster memory format."""
    ratio_compile: float | None = None
    """To torch.compile of the textbook step in the same precision."""
    ratio_float32: float | None = None
    """To the eager textbook step in float32."""


@dataclass
class Candidate:
    """A mode of the step, ready to be timed."""

    mode: str
    precision: str
    advance: Callable[[], None]
    flops: int
    memory: int
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        """Median of `times`, seconds per step."""
        return statistics.median(self.times)


def measure(
    model: ModelConfig,
    train: TrainConfig,
    modes: Sequence[str],
    precisions: Sequence[str],
    device: torch.device,
    compiler: str | None,
    rounds: int,
    say: Callable[[str], object] | None = None,
) -> list[Row]:
    """Check and time all modes in all precisions; a mode that runs out of memory is left out with a warning.

    Args:
        model: The nets.
        train: Settings of the step, without mode and precision.
        modes: Names from MODES, each with or without COMPILED behind it.
        precisions: Names as in `device.pick_precision`, "auto" resolved.
        device: The device to run on.
        compiler: The mode of torch.compile, for the modes with COMPILED.
        rounds: Turns; each mode takes one step per turn on a CPU, a few on a GPU.
        say: Called with a line before each mode is prepared.

    Raises:
        UserError: A mode's gradients or losses differ from the textbook's.
    """
    candidates: list[Candidate] = []
    search = train.cudnn_search == "auto"
    for precision in precisions:
        dtype = pick_precision(precision, device)[1]
        set_backends(precision, deterministic=train.deterministic, search=search)
        for mode in modes:
            if say:
                say(f"preparing {mode} in {precision}")
            try:
                check(model, train, [mode.removesuffix(COMPILED)], precision, dtype, device)
                candidates += prepare(model, train, mode, precision, dtype, device, compiler)
            except Exception as error:  # out of memory: the other modes are timed all the same
                if not is_out_of_memory(error):
                    raise
                warnings.warn(f"{mode} in {precision} does not fit into memory and is left out", stacklevel=2)
    for _ in range(rounds):
        for candidate in candidates:
            set_backends(candidate.precision, deterministic=train.deterministic, search=search)
            candidate.times.append(turn(candidate.advance, device))
    best: dict[tuple[str, str], Candidate] = {}
    for candidate in sorted(candidates, key=lambda candidate: candidate.seconds, reverse=True):
        best[candidate.mode, candidate.precision] = candidate  # the eager textbook has a candidate per memory format
    rows = []
    for mode, precision in dict.fromkeys((candidate.mode, candidate.precision) for candidate in candidates):
        fastest = best[mode, precision]
        baselines = [("textbook", precision), (f"textbook{COMPILED}", precision), ("textbook", "float32")]
        ratios = [ratio(best[key].times, fastest.times) if key in best else None for key in baselines]
        seconds, rate = fastest.seconds, train.batch_size / fastest.seconds
        rows.append(Row(mode, precision, 1e3 * seconds, rate, fastest.flops, fastest.memory, *ratios))
    return rows


def configured(train: TrainConfig, mode: str) -> TrainConfig:
    """`train` with the settings of a mode from MODES."""
    if mode == "alternating":
        return replace(train, passes="single-pass", updates="alternating", latents="shared")
    return replace(train, passes=mode, updates="simultaneous", latents="shared")


def inputs(model: ModelConfig, train: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """Draw a batch of noise for `model`, of `train.batch_size` images.

    Returns images [N, 3, size, size], channels_last, and latents [N, latent], both float32 in [-1, 1).
    """
    count = train.batch_size
    images = latents(train.seed, 0, 0, count * model.size, 3 * model.size, device)
    images = images.view(count, 3, model.size, model.size).contiguous(memory_format=torch.channels_last)
    return images, latents(train.seed, Z_D, 0, count, model.latent, device)


def check(
    model: ModelConfig,
    train: TrainConfig,
    modes: Sequence[str],
    precision: str,
    dtype: torch.dtype | None,
    device: torch.device,
) -> None:
    """Compare gradients with the textbook's in the same precision.

    Args:
        model: The nets.
        train: Settings of the step.
        modes: Names from MODES; alternating has other gradients and is skipped.
        precision: Its name, which sets the tolerance.
        dtype: The dtype of autocast in this precision; None for float32 and tf32.
        device: The device to run on.

    Raises:
        UserError: A mode's gradients differ by more than rounding explains.
    """
    nets = build(model, seed=train.seed, device=device)
    real, z = inputs(model, train, device)
    k = torch.full((), 0.1, device=device)
    scale = torch.full((), FIRST_LOSS_SCALE, device=device) if dtype == torch.float16 else None

    def gradients(mode: str) -> list[Tensor]:
        for net in nets:
            net.zero_grad(set_to_none=True)
        OBJECTIVES[mode](*nets, k, train, dtype=dtype, loss_scale=scale).for_both(real, z, z)
        return [p.grad for net in nets for p in net.parameters() if p.grad is not None]

    expected = gradients("textbook")
    for mode in sorted(set(modes) & set(OBJECTIVES)):
        for got, want in zip(gradients(mode), expected, strict=True):
            error = ((got - want).norm() / want.norm().clamp(min=1e-12)).item()
            if not error <= _TOLERANCE[precision]:
                raise UserError(f"{mode} in {precision} has gradients {error:.2g} from the textbook's; not timed")


def prepare(
    model: ModelConfig,
    train: TrainConfig,
    mode: str,
    precision: str,
    dtype: torch.dtype | None,
    device: torch.device,
    compiler: str | None,
) -> list[Candidate]:
    """Build a mode's candidates and take their first steps.

    Args:
        model: The nets.
        train: Settings of the step.
        mode: A name from MODES, with or without COMPILED behind it.
        precision: Its name, which sets the tolerance.
        dtype: The dtype of autocast in this precision; None for float32 and tf32.
        device: The device to run on.
        compiler: The mode of torch.compile, for a mode with COMPILED.

    Returns:
        One candidate; two for the eager textbook, one per memory format; none where compiling fails.

    Raises:
        UserError: torch.compile changes the losses.
    """
    name = mode.removesuffix(COMPILED)
    config = configured(train, name)
    cost = step_cost(model, config, dtype)
    candidates = []
    eager = mode == "textbook"
    for layout in (torch.channels_last, torch.contiguous_format) if eager else (torch.channels_last,):
        before = 0
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            before = torch.cuda.memory_allocated(device)
        nets = build(model, seed=train.seed, device=device)
        real, z = inputs(model, train, device)
        for net in nets:
            net.to(memory_format=layout)  # pyright: ignore[reportCallIssue]
        real = real.contiguous(memory_format=layout)
        step = TrainStep(*nets, config, dtype, compiler if mode.endswith(COMPILED) else None)
        # the compiled textbook gets a CUDA graph too, since max-autotune would make one itself
        advance = GraphedStep(lambda step=step, real=real, z=z: step(real, z, z), device, enabled=not eager)
        for _ in range(_FIRST_STEPS):
            advance()
        memory = cost.memory
        if device.type == "cuda":
            synchronize(device)
            memory = torch.cuda.max_memory_allocated(device) - before
        if mode.endswith(COMPILED):
            if not step.objective.compiled:  # the step has warned
                return []
            plain = TrainStep(*build(model, seed=train.seed, device=device), config, dtype)
            for _ in range(_FIRST_STEPS):
                plain(real, z, z)
            drift = (step.equilibrium.sums / plain.equilibrium.sums)[:2].sub(1).abs().max().item()
            if not drift <= _TOLERANCE[precision]:
                raise UserError(f"{mode} in {precision} has losses {drift:.2g} from those without; not timed")
        candidates.append(Candidate(mode, precision, advance, cost.flops, memory))
    return candidates


def turn(advance: Callable[[], None], device: torch.device) -> float:
    """Take a turn of steps: seconds per step."""
    steps = _GPU_STEPS if device.type == "cuda" else 1
    synchronize(device)
    start = time.perf_counter()
    for _ in range(steps):
        advance()
    synchronize(device)
    return (time.perf_counter() - start) / steps
