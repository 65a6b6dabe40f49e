"""`fastbegan bench step`: every way to do a training step, timed turn by turn in one run."""

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
from .results import ratio

MODES = ("textbook", "single-pass", "joint", "alternating")
COMPILED = "+compile"
DEFAULT_MODES = ("textbook", f"textbook{COMPILED}", *MODES[1:], f"single-pass{COMPILED}")
# how far gradients may be from the textbook's before a mode is not timed: rounding turns the sign of some errors
_TOLERANCE = {"float32": 5e-3, "tf32": 2e-2, "bf16": 2e-1, "fp16": 2e-1}
_FIRST_STEPS = 5  # a graph is captured in the fourth
_GPU_STEPS = 5  # a turn's steps there, so that the queue never runs dry


@dataclass
class Row:
    """One mode in one precision; ratios say how many times faster it is, None where the other was not measured."""

    mode: str
    precision: str
    ms: float
    images_per_second: float
    flops: int
    peak_bytes: int
    """Of a GPU as measured, else modelled."""
    ratio_eager: float | None = None
    """To the eager textbook step in the same precision and its faster memory format."""
    ratio_compile: float | None = None
    """To torch.compile of the textbook step in the same precision."""
    ratio_float32: float | None = None
    """To the eager textbook step in float32."""


@dataclass
class Candidate:
    """A way to do a step, ready to be timed."""

    mode: str
    precision: str
    advance: Callable[[], None]
    flops: int
    memory: int
    times: list[float] = dataclasses.field(default_factory=list)

    @property
    def seconds(self) -> float:
        return statistics.median(self.times)


def measure(
    model: ModelConfig, train: TrainConfig, modes: Sequence[str], precisions: Sequence[str], device: torch.device,
    compiler: str | None, rounds: int, say: Callable[[str], object] | None = None,
) -> list[Row]:  # fmt: skip
    """A row for each mode and precision. Raises UserError where a mode's gradients are not the textbook's."""
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
            except Exception as error:  # the others are timed all the same
                if not is_out_of_memory(error):
                    raise
                warnings.warn(f"{mode} in {precision} does not fit into memory and is left out", stacklevel=2)
    for _ in range(rounds):
        for candidate in candidates:
            set_backends(candidate.precision, deterministic=train.deterministic, search=search)
            candidate.times.append(turn(candidate.advance, device))
    best: dict[tuple[str, str], Candidate] = {}
    for candidate in sorted(candidates, key=lambda one: one.seconds, reverse=True):
        best[candidate.mode, candidate.precision] = candidate  # the eager textbook is there in both memory formats
    rows = []
    for mode, precision in dict.fromkeys((one.mode, one.precision) for one in candidates):
        own = best[mode, precision]
        others = [("textbook", precision), (f"textbook{COMPILED}", precision), ("textbook", "float32")]
        ratios = [ratio(best[other].times, own.times) if other in best else None for other in others]
        rate = train.batch_size / own.seconds
        rows.append(Row(mode, precision, 1e3 * own.seconds, rate, own.flops, own.memory, *ratios))
    return rows


def configured(train: TrainConfig, mode: str) -> TrainConfig:
    """The settings of a mode."""
    if mode == "alternating":
        return replace(train, passes="single-pass", updates="alternating", latents="shared")
    return replace(train, passes=mode, updates="simultaneous", latents="shared")


def inputs(model: ModelConfig, train: TrainConfig, device: torch.device) -> tuple[Tensor, Tensor]:
    """A batch of noise in [-1, 1] and its latents."""
    count = train.batch_size
    images = latents(train.seed, 0, 0, count * model.size, 3 * model.size, device)
    images = images.view(count, 3, model.size, model.size).contiguous(memory_format=torch.channels_last)
    return images, latents(train.seed, Z_D, 0, count, model.latent, device)


def check(
    model: ModelConfig, train: TrainConfig, modes: Sequence[str], precision: str, dtype: torch.dtype | None,
    device: torch.device,
) -> None:  # fmt: skip
    """Hold each way to get simultaneous gradients to the textbook's in the same precision."""
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
    model: ModelConfig, train: TrainConfig, mode: str, precision: str, dtype: torch.dtype | None,
    device: torch.device, compiler: str | None,
) -> list[Candidate]:  # fmt: skip
    """What is timed for a mode: two for the eager textbook, one in each memory format; none where compiling fails.

    Raises UserError where torch.compile changes the losses.
    """
    name = mode.removesuffix(COMPILED)
    config = configured(train, name)
    cost = step_cost(model, config, dtype)
    made = []
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
        # the compiled textbook gets the graph too, as max-autotune would make its own
        advance = GraphedStep(lambda step=step, real=real, z=z: step(real, z, z), device, enabled=not eager)
        for _ in range(_FIRST_STEPS):
            advance()
        memory = cost.memory
        if device.type == "cuda":
            torch.cuda.synchronize(device)
            memory = torch.cuda.max_memory_allocated(device) - before
        if mode.endswith(COMPILED):
            if not step.objective.compiled:  # it has warned
                return []
            plain = TrainStep(*build(model, seed=train.seed, device=device), config, dtype)
            for _ in range(_FIRST_STEPS):
                plain(real, z, z)
            drift = (step.equilibrium.sums / plain.equilibrium.sums)[:2].sub(1).abs().max().item()
            if not drift <= _TOLERANCE[precision]:
                raise UserError(f"{mode} in {precision} has losses {drift:.2g} from those without; not timed")
        made.append(Candidate(mode, precision, advance, cost.flops, memory))
    return made


def turn(advance: Callable[[], None], device: torch.device) -> float:
    """Seconds a step."""
    if device.type != "cuda":
        start = time.perf_counter()
        advance()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(_GPU_STEPS):
        advance()
    torch.cuda.synchronize(device)
    return (time.perf_counter() - start) / _GPU_STEPS
