"""A whole training step against the textbook: eager PyTorch, and torch.compile of it."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest

from bench.counts import breakdown, graphs, launches
from bench.gpu_cases import DEVICE, ON_CPU
from fastbegan.config import ModelConfig, TrainConfig
from fastbegan.device import pick_compile, pick_precision, set_backends
from fastbegan.measure.results import Row
from fastbegan.measure.step import COMPILED, Candidate, check, configured, prepare, turn
from fastbegan.training.cost import step_cost

PRECISION = "float32" if ON_CPU else "bf16"
# image size, n, batch; the first one is the quick run's
SHAPES = [(64, 64, 16), (128, 128, 16), (64, 64, 64), (128, 128, 64)]
if ON_CPU:
    SHAPES = [(32, 16, 16), (32, 32, 16), (64, 32, 16)]
_SEARCH = "max-autotune"


@cache
def _prepared(mode: str, px: int, filters: int, batch: int, compiler: str | None) -> list[Candidate]:
    """Once for all races of a shape: compiling takes longer than timing."""
    model, train = ModelConfig(size=px, filters=filters), TrainConfig(batch_size=batch)
    dtype = pick_precision(PRECISION, DEVICE)[1]
    set_backends(PRECISION)
    return prepare(model, train, mode, PRECISION, dtype, DEVICE, compiler)


def _modes(*, quick: bool, first: bool) -> dict[str, tuple[str, str | None]]:
    """Others in the race: mode and torch.compile's mode, by name."""
    found: dict[str, tuple[str, str | None]] = {"eager": ("textbook", None)}
    compiler = pick_compile("auto", DEVICE, float("inf"))[0]
    if compiler and (quick or first):
        found["compile"] = (f"textbook{COMPILED}", compiler)
    if compiler and first and not quick and not ON_CPU:
        found["max-autotune"] = (f"textbook{COMPILED}", _SEARCH)
    return found


def _faster(candidates: list[Candidate]) -> Candidate:
    """Of the textbook in both memory formats."""
    for candidate in candidates * 3 if len(candidates) > 1 else []:
        candidate.times.append(turn(candidate.advance, DEVICE))
    return min(candidates, key=lambda one: one.seconds) if len(candidates) > 1 else candidates[0]


@pytest.mark.parametrize("own", ["single-pass", "joint", f"single-pass{COMPILED}"])
@pytest.mark.parametrize("place", range(len(SHAPES)), ids=["{}px-n{}-batch{}".format(*shape) for shape in SHAPES])
def bench_step(
    place: int, own: str, race: Callable[..., Row], needs: Callable[[float], None], quick: bool, sizes: list[int]
) -> None:
    px, filters, batch = SHAPES[place]
    if (quick and (place or own.endswith(COMPILED))) or (sizes and px not in sizes):
        pytest.skip("not in --quick" if quick else "not in --sizes")
    model, train = ModelConfig(size=px, filters=filters), TrainConfig(batch_size=batch)
    dtype = pick_precision(PRECISION, DEVICE)[1]
    mode = own.removesuffix(COMPILED)
    train_own = configured(train, mode)
    cost, textbook = step_cost(model, train_own, dtype), step_cost(model, configured(train, "textbook"), dtype)
    others = _modes(quick=quick, first=px == SHAPES[-1][0] and batch == 16)
    needs((2 + len(others)) * textbook.memory)
    check(model, train, [mode], PRECISION, dtype, DEVICE)
    compiler = others.get("compile", (None, None))[1] or pick_compile("auto", DEVICE, float("inf"))[0]
    if own.endswith(COMPILED) and compiler is None:
        pytest.skip("torch.compile has no compiler here")
    found = _prepared(own, *SHAPES[place], compiler if own.endswith(COMPILED) else None)
    assert found, "torch.compile failed, as a warning says"
    (candidate,) = found
    turns = {own: candidate.advance}
    for name, (other, how) in others.items():
        assert _prepared(other, *SHAPES[place], how), "torch.compile failed, as a warning says"
        turns[name] = _faster(_prepared(other, *SHAPES[place], how)).advance
    counts = {"bytes kept an image": cost.kept}
    if not (own.endswith(COMPILED) and ON_CPU):  # compiled code there dispatches nothing, but where it is watched
        counts |= launches(candidate.advance, DEVICE)
    if not own.endswith(COMPILED):
        counts |= graphs(*SHAPES[place], mode)
    row = Row(
        "step", f"{px} px n {filters} batch {batch} {own}", precision=PRECISION, images=batch, flops=cost.flops,
        textbook_flops=textbook.flops, peak_bytes=candidate.memory, counts=counts,
    )  # fmt: skip
    row.breakdown = {} if quick else breakdown(candidate.advance, DEVICE)
    race(row, turns)
