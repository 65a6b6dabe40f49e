"""A race of all forms of one op, forward or both ways, on the inputs that the GPU scripts use."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from bench.gpu_candidates import differentiable
from bench.gpu_cases import ON_CPU, Case
from bench.gpu_timed_cases import SLOW
from bench.gpu_timing import Run, capture, contenders, in_turns, rotation
from fastbegan.measure.results import Row

MODE = "fp32" if ON_CPU else "bf16"
_PRECISION = {"fp32": "float32", "bf16": "bf16"}
_COPIES = 6  # of the inputs: outputs, gradients and what operations make on their way


def race_op(
    case: Case, row: Row, race: Callable[..., Row], needs: Callable[[float], None], *, backward: bool, quick: bool,
    search: bool = False,
) -> Row:  # fmt: skip
    """Check every form against eager PyTorch, then time them; a form that is wrong fails the benchmark.

    torch.compile takes part with `search`, unless the run is `quick`; on a GPU also with its own search for kernels.
    """
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch.compiler.reset()
    compilers = () if quick or not search else ("default",) if ON_CPU else ("default", SLOW)
    case = replace(case, mode=MODE, compilers=compilers)
    needs(_COPIES * max(_bytes(case), 0 if ON_CPU else 1 << 28))
    dropped: dict[str, str] = {}
    given, _ = rotation(case)
    runs = contenders(case, given, backward, dropped)
    held: list[object] = [given]  # so that new inputs lie elsewhere
    for name in [name for name in dropped if name.startswith("cudnn graph")]:  # not ours to mend
        warnings.warn(f"left out: {name}: {dropped.pop(name)}", stacklevel=2)
    if dropped:
        pytest.fail(f"not timed, since it is wrong or does not run: {dropped}")
    left_out = {"algebraic"} if ON_CPU else set()  # what "auto" is there
    runs = {name: runs[name] for name in dict.fromkeys(("auto", "eager", *runs)) if name not in left_out}
    captured = {name: capture(run, len(given)) for name, run in runs.items()}

    def anew() -> dict[str, Callable[[], object]]:
        others, _ = rotation(case)
        held.append(others)
        again = contenders(case, others, backward, {})
        # as many calls a turn as the first time
        return {name: in_turns(again[name], len(others), captured[name][1]["calls"]) for name in runs}

    row.precision, row.flops = _PRECISION[MODE], _flops(runs["auto"])
    row.textbook_flops = _flops(runs["eager"])
    read = [given[0][0][: case.shape[0]], *given[0][1:]] if case.op == "normalize_images" else given[0]
    row.moved = _moved(runs["auto"], read, backward and bool(differentiable(case)))
    turns = {name: turn for name, (turn, _) in captured.items()}
    calls = {name: known["calls"] for name, (_, known) in captured.items()}
    return race(row, turns, calls=calls, anew=anew if ON_CPU else None)


def _bytes(case: Case) -> int:
    samples, inputs, height, width, outputs = case.shape
    return 4 * samples * height * width * (inputs + 4 * outputs)


def _flops(run: Run) -> int | None:
    with FlopCounterMode(display=False) as counter:
        run(0)
    return counter.get_total_flops() or None


def _moved(run: Run, given: list[Tensor], backward: bool) -> int:
    """Inputs read and results written once; going back, what is kept and the gradient are read again."""
    found = run(0)
    assert isinstance(found, list)
    moved = sum(value.nbytes for value in (*given, *found))
    outputs = len(found) - sum(value.requires_grad for value in given)
    return moved + (sum(value.nbytes for value in (*given, *2 * found[:outputs])) if backward else 0)
