"""A race of all forms of one op, forward or both ways."""

from __future__ import annotations

import itertools
import math
import time
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import CAPABILITY, DEVICE, ON_CPU, PRECISION, Case, Form, Results, rotation
from fastbegan.measure.machine import synchronize
from fastbegan.measure.results import Row

Run = Callable[[int], object]  # one call on the inputs of this number
Turns = dict[str, Callable[[], object]]
_COPIES = 6  # of the inputs: outputs, gradients and what operations make on their way
_TURN = 8e-3 if ON_CPU else 1e-3  # seconds at least: a launch and a clock must not count
_NEAR = 1e-3 if PRECISION == "float32" else 2e-2  # by norm; tests/kernels hold every form to float64


def race_op(
    case: Case, row: Row, race: Callable[..., Row], needs: Callable[[float], None], *, quick: bool, search: bool = False
) -> Row:
    """Hold every form to eager PyTorch, then time them; a wrong one is not timed and fails the benchmark.

    torch.compile takes part with `search`, unless the run is `quick`; on a GPU also with its own search for kernels.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()
    samples, inputs, height, width, outputs = case.shape
    needs(_COPIES * max(4 * samples * height * width * (inputs + 4 * outputs), 0 if ON_CPU else 1 << 28))
    sets = rotation(case)
    runs, faults = contenders(case, sets, _forms(case, compiled=search and not quick))
    if "auto" in faults:
        pytest.fail(f"not timed, since it is wrong or does not run: {faults}")
    turns, calls = timed(runs, len(sets))
    held: list[object] = [sets]  # so that new inputs lie elsewhere

    def anew() -> Turns:
        others = rotation(case)
        held.append(others)
        again, _ = contenders(case, others, _forms(case, compiled=search and not quick))
        return {name: in_turns(again[name], len(others), calls[name]) for name in runs}  # as many calls as before

    row.precision, row.flops, row.textbook_flops = PRECISION, _flops(runs["auto"]), _flops(runs["eager"])
    read = [sets[0][0][:samples], *sets[0][1:]] if case.op == "normalize_images" else sets[0]
    row.moved = _moved(runs["auto"], read, backward=case.backward and case.differentiable > 0)
    race(row, turns, calls=calls, anew=anew if ON_CPU else None)
    if faults:
        pytest.fail(f"left out, since it is wrong or does not run: {faults}")
    return row


def _forms(case: Case, *, compiled: bool) -> dict[str, Form]:
    """Every form of a case by name: ours, then what it is held to, then the others."""
    forms = {"auto": case.form(None), "eager": case.form("reference")}
    if not ON_CPU:  # where the automatic choice is the algebraic tier
        forms["algebraic"] = case.form("algebraic")
        if not case.kinds or CAPABILITY >= (8, 0):
            forms["fused"] = case.form("fused")
    if compiled:
        forms["compile"] = torch.compile(forms["eager"], dynamic=False)
        if not ON_CPU:  # without graphs of its own: all forms are captured alike
            options: Any = {"dynamic": False, "mode": "max-autotune-no-cudagraphs"}
            forms["max-autotune"] = torch.compile(case.form("reference"), **options)
    return forms


def contenders(case: Case, sets: list[list[Tensor]], forms: dict[str, Form]) -> tuple[dict[str, Run], dict[str, str]]:
    """Calls of the forms that are right, and of the others what is wrong."""
    folded = [case.folded(inputs) for inputs in sets]
    for value in itertools.chain.from_iterable(inputs[: case.differentiable] for inputs in (*sets, *folded)):
        value.requires_grad_(case.backward)
    grads = [torch.randn_like(value) for value in results(forms["eager"], sets[0], None)] if case.backward else None
    eager = results(forms["eager"], sets[0], grads)
    runs: dict[str, Run] = {}
    faults: dict[str, str] = {}
    for name, form in forms.items():
        ours = name in ("auto", "algebraic", "fused")
        inputs = folded if ours else sets
        runs[name] = lambda number, form=form, inputs=inputs: results(form, inputs[number], grads)
        if name == "eager":
            continue
        try:
            values = results(form, inputs[0], grads)
            distances = [
                _distance(*pair) for pair in zip(case.unfolded(values) if ours else values, eager, strict=True)
            ]
            if not all(distance <= _NEAR for distance in distances):
                faults[name] = f"is {max(distances):.2g} from eager by norm"
        except Exception as error:
            synchronize(DEVICE)  # which raises where the context is lost
            faults[name] = f"{type(error).__name__}: {error}"[:300]
    return {name: run for name, run in runs.items() if name not in faults}, faults


def results(form: Form, inputs: list[Tensor], grads: list[Tensor] | None) -> Results:
    """Outputs and, where there are gradients to begin from, the gradients of all inputs that want one."""
    if grads is None:
        with torch.no_grad():
            return list(form(*inputs))
    outputs = list(form(*inputs))
    wanted = [value for value in inputs if value.requires_grad]
    return [*(value.detach() for value in outputs), *torch.autograd.grad(outputs, wanted, grads)]


def _distance(got: Tensor, eager: Tensor) -> float:
    """Relative difference by norm; infinite for a wrong shape."""
    if got.shape != eager.shape:
        return math.inf
    return ((got.double() - eager.double()).norm() / eager.double().norm().clamp(min=1e-30)).item()


def timed(runs: dict[str, Run], sets: int) -> tuple[Turns, dict[str, int]]:
    """A turn of each: several calls over rotating inputs, on a GPU as one graph; and how many calls."""
    turns: Turns = {}
    calls: dict[str, int] = {}
    for name, run in runs.items():
        for number in range(3 if ON_CPU else max(3, sets)):
            run(number % sets)
        synchronize(DEVICE)
        start = time.perf_counter()
        for number in range(5):
            run(number % sets)
        synchronize(DEVICE)
        calls[name] = math.ceil(5 * _TURN / (time.perf_counter() - start))
        if not ON_CPU:
            calls[name] = min(64, max(sets, calls[name]))
        turns[name] = in_turns(run, sets, calls[name])
        if not ON_CPU:
            turns[name] = _replayed(turns[name], run, name)
    return turns, calls


def in_turns(run: Run, sets: int, calls: int) -> Callable[[], None]:
    """Several calls a turn, which goes on with the inputs where the last one ended."""
    starts = itertools.count(0, calls)

    def turn() -> None:
        first = next(starts)
        for number in range(first, first + calls):
            run(number % sets)

    return turn


def _replayed(turn: Callable[[], object], run: Run, name: str) -> Callable[[], object]:
    """A turn as a CUDA graph; as it is where it cannot be captured."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            turn()
    except Exception as error:
        synchronize(DEVICE)
        warnings.warn(f"{name} is timed with the host's share, as it was not captured: {error}", stacklevel=2)
        return turn
    return graph.replay


def _flops(run: Run) -> int | None:
    with FlopCounterMode(display=False) as counter:
        run(0)
    return counter.get_total_flops() or None


def _moved(run: Run, inputs: list[Tensor], *, backward: bool) -> int:
    """Inputs read and results written once; going back, what is kept and the gradient are read again."""
    values = run(0)
    assert isinstance(values, list)
    moved = sum(value.nbytes for value in (*inputs, *values))
    outputs = values[: len(values) - sum(value.requires_grad for value in inputs)]
    return moved + (sum(value.nbytes for value in (*inputs, *2 * outputs)) if backward else 0)
