"""A whole training step against the textbook: eager PyTorch, and torch.compile of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from bench.cases import DEVICE, ON_CPU, PRECISION
from bench.counts import breakdown, graphs, launches
from fastbegan.config import ModelConfig, TrainConfig
from fastbegan.device import pick_compile, pick_precision, set_backends
from fastbegan.measure.results import Row
from fastbegan.measure.step import COMPILED, Candidate, check, configured, prepare, turn
from fastbegan.training.cost import step_cost

# image size, n, batch; the first one is the quick run's
SHAPES = [(64, 64, 16), (128, 128, 16), (64, 64, 64), (128, 128, 64)]
if ON_CPU:
    SHAPES = [(32, 16, 16), (32, 32, 16), (64, 32, 16)]
STEPS = 1 if ON_CPU else 5  # a turn's, so that a GPU's queue never runs dry
OWN = [(mode, PRECISION) for mode in ("single-pass", "joint", f"single-pass{COMPILED}")]
if not ON_CPU:
    OWN += [("alternating", PRECISION), ("single-pass", "fp16" if PRECISION == "bf16" else "float32")]
_SEARCH = "max-autotune"


@cache
def _prepared(mode: str, px: int, filters: int, batch: int, compiler: str | None, precision: str) -> list[Candidate]:
    """Once for all races of a shape: compiling takes longer than timing."""
    model, train = ModelConfig(size=px, filters=filters), TrainConfig(batch_size=batch)
    return prepare(model, train, mode, precision, pick_precision(precision, DEVICE)[1], DEVICE, compiler)


def _modes(*, quick: bool, first: bool) -> dict[str, tuple[str, str | None]]:
    """Others in the race: mode and torch.compile's mode, by name."""
    others: dict[str, tuple[str, str | None]] = {"eager": ("textbook", None)}
    compiler = pick_compile("auto", DEVICE, float("inf"))[0]
    if compiler and (quick or first):
        others["compile"] = (f"textbook{COMPILED}", compiler)
    if compiler and first and not quick and not ON_CPU:
        others["max-autotune"] = (f"textbook{COMPILED}", _SEARCH)
    return others


def _faster(candidates: list[Candidate]) -> Candidate:
    """Of the textbook in both memory formats."""
    for candidate in candidates * 3 if len(candidates) > 1 else []:
        candidate.times.append(turn(candidate.advance, DEVICE))
    return min(candidates, key=lambda one: one.seconds) if len(candidates) > 1 else candidates[0]


def _profiled(count: Callable[..., dict[str, Any]], candidate: Candidate) -> dict[str, Any]:
    """Nothing where the profiler is not allowed to see the GPU, as in many containers: the times count all the same."""
    try:
        return count(candidate.advance, DEVICE)
    except Exception as error:
        warnings.warn(f"{count.__name__} could not be profiled: {error}", stacklevel=2)
        return {}


def _steps(candidate: Candidate) -> Callable[[], None]:
    def turn() -> None:
        for _ in range(STEPS):
            candidate.advance()

    return turn


@pytest.mark.parametrize(("own", "precision"), OWN)
@pytest.mark.parametrize("net", SHAPES, ids=["{}px-n{}-batch{}".format(*shape) for shape in SHAPES])
def bench_step(
    net: tuple[int, int, int],
    own: str,
    precision: str,
    race: Callable[..., Row],
    needs: Callable[[float], None],
    quick: bool,
    sizes: list[int],
) -> None:
    px, filters, batch = net
    compiled = own.endswith(COMPILED)
    if (quick and (net != SHAPES[0] or compiled)) or (sizes and px not in sizes):
        pytest.skip("not in --quick" if quick else "not in --sizes")
    model, train = ModelConfig(size=px, filters=filters), TrainConfig(batch_size=batch)
    dtype = pick_precision(precision, DEVICE)[1]
    set_backends(precision)
    mode = own.removesuffix(COMPILED)
    cost, textbook = (step_cost(model, configured(train, one), dtype) for one in (mode, "textbook"))
    others = _modes(quick=quick, first=batch == 16 and (not ON_CPU or px == SHAPES[-1][0]))
    if precision != PRECISION:
        others = {"eager": others["eager"]}
    needs((2 + len(others)) * textbook.memory)
    check(model, train, [mode], precision, dtype, DEVICE)
    compiler = others.get("compile", (None, None))[1] or pick_compile("auto", DEVICE, float("inf"))[0]
    if compiled and compiler is None:
        pytest.skip("torch.compile has no compiler here")
    prepared = _prepared(own, *net, compiler if compiled else None, precision)
    assert prepared, "torch.compile failed, as a warning says"
    (candidate,) = prepared
    turns = {own: _steps(candidate)}
    for name, (other, compiler) in others.items():
        prepared = _prepared(other, *net, compiler, precision)
        assert prepared, "torch.compile failed, as a warning says"
        turns[name] = _steps(_faster(prepared))
    counts = {"bytes kept an image": cost.kept}
    if not (compiled and ON_CPU):  # compiled code there dispatches nothing, but where it is watched
        counts |= _profiled(launches, candidate)
    if not compiled:
        counts |= graphs(*net, mode)
    name = f"{px} px n {filters} batch {batch} {own}" + (f" in {precision}" if precision != PRECISION else "")
    row = Row("step", name, precision=precision, images=batch, peak_bytes=candidate.memory, counts=counts)
    row.flops, row.textbook_flops = cost.flops, textbook.flops
    row.breakdown = {} if quick else _profiled(breakdown, candidate)
    race(row, turns, calls=dict.fromkeys(turns, STEPS))
