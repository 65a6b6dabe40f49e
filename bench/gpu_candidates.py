"""What is timed: every form of an op, on which inputs, and whether it is right there."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from bench import cudnn_graph
from bench.gpu_cases import DEVICE, DRY, ON_CPU, Case, tile_of
from bench.gpu_numerics import Draw
from fastbegan_kernels import (
    conv2d_elu,
    conv_stage,
    equilibrium_update,
    fold,
    l1_reconstruction_loss,
    l1_reconstruction_loss_with_gradients,
    normalize_images,
    problems,
    skip_phase_table,
    tuning,
    upsample_conv2d_elu,
)
from fastbegan_kernels.fold import fold_upsample
from fastbegan_kernels.fused import launch, tiles
from fastbegan_kernels.problems import Layer, dtype_named
from fastbegan_kernels.tiers import KINDS

STAGES = {"decoder": ("same", "same", "up"), "encoder": ("same", "down")}
_IMPLS = {"eager": "reference", "algebraic": "algebraic", "fused": "fused", "auto": None}
Results = list[Tensor]


@dataclass(frozen=True)
class Candidate:
    """One form of an op, whether weights of up-convolutions come to it folded, and what must hold while it runs."""

    run: Callable[..., Sequence[Tensor]]
    packed: bool = False
    around: Callable[[], AbstractContextManager[None]] = nullcontext
    forward_only: bool = False


def kinds_of(op: str) -> tuple[str, ...]:
    """The layers of an op; none where it has no convolutions."""
    return STAGES.get(op, (op,) if op in KINDS else ())


def network(n: int) -> list[tuple[int, int, str]]:
    """Outputs, inputs and packed kind of the convolutions of a discriminator and a generator with skips, n filters."""
    encoder = [(n, 3, "conv")]
    for level in range(1, 5):
        encoder += [(level * n, level * n, "conv"), (min(level + 1, 4) * n, level * n, "conv")]
    decoder = [(n, n, kind) for kind in ("conv", "conv", *("up", "skip", "conv") * 3)] + [(3, n, "conv")]
    return encoder[:2] + decoder[2:5] if DRY else encoder + 2 * decoder


def inputs(case: Case) -> list[Tensor]:
    """Random inputs of a timed op, in the order in which it takes them."""
    n, c, h, w, k = case.shape
    draw = Draw(case.dtype, case.seed)
    if kinds := kinds_of(case.op):
        x, weights = draw(n, c, h, w), [draw(k, c, 3, 3, scale=(9 * c) ** -0.5) for _ in kinds]
        return [x, *weights, *(draw(k) for _ in kinds)]
    if case.op == "fold":  # masters are float32 whatever they are packed to
        master = Draw(torch.float32, case.seed)
        return [master(outputs, given, 3, 3) for outputs, given, _ in network(c)]
    if case.op == "normalize_images":  # stored: more than fits into the L2 cache
        return list(draw.pictures(n if DRY else 64 * n, n, (h, w, c)).values())
    if case.op == "equilibrium_update":
        return [draw(n).abs(), draw(n).abs()]
    if case.op == "skip_phase_table":
        return [draw(n, c, h, w), draw(k, c, 3, 3, scale=(9 * c) ** -0.5)]
    pair = [draw(n, c, h, w), draw(n, c, h, w)]
    return pair if case.op == "l1_reconstruction_loss" else [*pair, draw(n).float()]


def differentiable(case: Case) -> int:
    """How many of the inputs want a gradient, from the first on."""
    if case.op in ("l1_reconstruction_loss", "skip_phase_table"):
        return 2 if case.extra else 1
    return 2 * len(kinds_of(case.op)) + 1 if kinds_of(case.op) else len(network(1)) if case.op == "fold" else 0


def packed(case: Case, given: list[Tensor]) -> list[Tensor]:
    """The inputs with the weights of up-convolutions folded, as a net does it once a step (timed as `fold`)."""
    found = list(given)
    for place, kind in enumerate(kinds_of(case.op), 1):
        if kind == "up":
            folded = fold_upsample(given[place].detach().float()).to(case.dtype)
            found[place] = folded.contiguous(memory_format=torch.channels_last)
    return found


def _unpacked(case: Case, found: Results) -> Results:
    """Output and gradients of a candidate that got folded weights, with the gradients of the weights unfolded."""
    found = list(found)
    for place, kind in enumerate(kinds_of(case.op), 1):
        if kind == "up" and len(found) > 1:
            like = torch.zeros(case.shape[4], case.shape[1], 3, 3, device=DEVICE, requires_grad=True)
            (found[place + 1],) = torch.autograd.grad(fold_upsample(like), like, found[place + 1].float())
    return found


def _layers(case: Case, impl: str | None) -> Callable[..., Sequence[Tensor]]:
    kinds = kinds_of(case.op)

    def run(x: Tensor, *rest: Tensor) -> list[Tensor]:
        weights, biases = rest[: len(kinds)], rest[len(kinds) :]
        if case.op in STAGES:
            return [conv_stage(x, weights, biases, kinds=kinds, impl=impl)]
        if case.op == "up":
            return [upsample_conv2d_elu(x, weights[0], biases[0], impl=impl)]
        return [conv2d_elu(x, weights[0], biases[0], stride=1 if case.op == "same" else 2, impl=impl)]

    return run


def _controller(impl: str | None) -> Callable[..., Sequence[Tensor]]:
    """One step of k after another, so that a replay has something to do."""
    k, sums = torch.full((), 0.2, device=DEVICE), torch.ones(6, device=DEVICE)
    window = torch.ones(2, device=DEVICE, dtype=torch.float64)

    def run(real: Tensor, fake: Tensor) -> list[Tensor]:
        equilibrium_update(real, fake, k, sums, window, gamma=0.5, lambda_k=1e-3, impl=impl)
        return [k]

    return run


def _plain_op(case: Case, impl: str | None) -> Callable[..., Sequence[Tensor]]:
    """An op without a matrix product."""
    if case.op == "equilibrium_update":
        return _controller(impl)
    if case.op == "fold":
        kinds = [kind for *_, kind in network(1)]
        return lambda *weights: fold(weights, kinds, dtype=case.dtype, impl=impl)
    if case.op == "skip_phase_table":
        return lambda h, weight: [skip_phase_table(h, weight, impl=impl)]
    if case.op == "normalize_images":
        return lambda *given: [normalize_images(*given, dtype=case.dtype, impl=impl)]
    if case.op == "l1_reconstruction_loss":
        return lambda *given: [l1_reconstruction_loss(*given, impl=impl)]

    def one_pass(*given: Tensor) -> list[Tensor]:
        found = l1_reconstruction_loss_with_gradients(*given, to_target=case.extra, impl=impl)
        return [value for value in found if value is not None]

    return one_pass


@contextmanager
def _forced(family: str, tile: str, allowed: Sequence[str]) -> Iterator[None]:
    """The layers' own choice replaced: this tile forward; else the first of its family that may be used, or none."""

    def choose(problem: Layer, device: torch.device, impl: str) -> str:
        if tile and not problem.backward:
            return tile
        shapes = (problem.x, problem.weight, problem.kind, dtype_named(problem.dtype), device)
        names = [found.name for found in launch.layer_tiles(*shapes, backward=problem.backward)]
        return next((name for name in names if name in allowed and name.startswith(family)), "algebraic")

    with mock.patch.object(tuning, "layer", choose), mock.patch.object(tiles, "tile_named", tile_of):
        yield


def candidates(case: Case) -> dict[str, Candidate]:
    """Every form of a case by name; eager PyTorch first, everything else is compared with it."""
    if kinds_of(case.op):
        found = {"eager": Candidate(_layers(case, "reference")), "auto": Candidate(_layers(case, None), True)}
        algebraic = Candidate(_layers(case, "algebraic"), True)
        if DRY:  # on a CPU the op would take the library's operations for it
            algebraic = Candidate(_layers(case, "fused"), True, partial(_forced, "algebraic", "algebraic", ()))
        found["algebraic"] = algebraic
        families = sorted({name.split()[0] for name in case.tiles})
        for name in families if case.op in STAGES else case.tiles:
            tile = "" if case.op in STAGES else name
            around = partial(_forced, name.split()[0], tile, case.tiles)
            found[f"fused {name}"] = Candidate(_layers(case, "fused"), True, around)
    else:
        impls = {name: impl for name, impl in _IMPLS.items() if DRY or not (ON_CPU and name == "fused")}
        found = {name: Candidate(_plain_op(case, impl)) for name, impl in impls.items()}
    for mode in case.compilers:
        options: dict[str, Any] = {"backend": "eager"} if DRY else {"mode": mode}
        compiled = torch.compile(found["eager"].run, dynamic=False, **options)
        found["compile" if mode == "default" else mode.removesuffix("-no-cudagraphs")] = Candidate(compiled)
    if case.op in ("same", "down") and cudnn_graph.INSTALLED and not ON_CPU:
        found["cudnn graph"] = Candidate(cudnn_graph.conv_bias_elu(1 if case.op == "same" else 2), forward_only=True)
    return found


def results(candidate: Candidate, given: list[Tensor], grads: list[Tensor] | None) -> Results:
    """Outputs and, where there are gradients to begin from, the gradients of all inputs that want one."""
    with candidate.around():
        if grads is None:
            with torch.no_grad():
                return list(candidate.run(*given))
        outputs = list(candidate.run(*given))
        wanted = [value for value in given if value.requires_grad]
        return [*(value.detach() for value in outputs), *torch.autograd.grad(outputs, wanted, grads)]


class Judge:
    """Whether a candidate may be timed: near eager PyTorch, and as near float64 in the first and the last sample."""

    def __init__(self, case: Case, eager: Candidate, given: list[Tensor], grads: list[Tensor] | None) -> None:
        self.case, self.own = case, results(eager, given, grads)
        self.ends = [0, case.shape[0] - 1]
        self.exact: Results = []
        if kinds_of(case.op):
            doubled = [value.detach().double() for value in (given[0][self.ends], *given[1:])]
            doubled[0].requires_grad_(grads is not None)
            torch.backends.cudnn.benchmark = False  # once only: a search would take longer
            self.exact = results(eager, doubled, grads and [grads[0][self.ends].double()])
            torch.backends.cudnn.benchmark = True

    def fault(self, candidate: Candidate, found: Results) -> str:
        """Why not, "" where nothing is wrong."""
        half = self.case.dtype != torch.float32
        found = _unpacked(self.case, found) if candidate.packed else found
        distance = max(_distance(a, b) for a, b in zip(found, self.own, strict=True))
        if distance > (2e-2 if half else 1e-3):
            return f"{distance:.2g} from eager by norm"
        factor = 4.0 if half and "up" in kinds_of(self.case.op) else 2.0  # folded weights round after folding
        worst = 0.0
        for number, exact in enumerate(self.exact):  # output and input gradient; the others sum over samples
            pair = found[number][self.ends], self.own[number][self.ends]
            # a gradient of half precision may be off by as much as a product in TF32: outputs between were rounded
            worst = max(worst, problems.excess(*pair, exact, tf32=half and number > 0, factor=factor))
        return f"{worst:.2g} times the allowed error" if worst > 1 else ""


def _distance(got: Tensor, own: Tensor) -> float:
    """Relative difference by norm; NaN and a wrong shape count as 1e9."""
    if got.shape != own.shape:
        return 1e9
    norm = ((got.double() - own.double()).norm() / own.double().norm().clamp(min=1e-30)).item()
    return norm if math.isfinite(norm) else 1e9
