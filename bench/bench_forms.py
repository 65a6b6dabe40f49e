"""Every form that the choice on a GPU is made from: layers and their input gradients, raced against the library."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from bench.cases import DEVICE, DTYPE, ON_CPU, PRECISION, sets_beyond_cache
from bench.ops import timed
from fastbegan.measure.results import Row
from fastbegan_kernels import problems, tuning
from fastbegan_kernels.conv_layer import KINDS, Layer
from fastbegan_kernels.problems import PLAIN, Form


@pytest.mark.parametrize("direction", ["forward", "input gradient"])
@pytest.mark.parametrize("kind", KINDS)
def bench_forms(
    kind: str, direction: str, shape: Any, race: Callable[..., Row], needs: Callable[[float], None]
) -> None:
    """The row is that of the form chosen on this machine, so one of the others is just as fast."""
    if ON_CPU:
        pytest.skip("a CPU has one form")
    px, n, _ = shape
    side = px // 2 if kind == "up" else px
    needs(64 * 16 * n * px * px)
    torch.backends.cudnn.benchmark = True  # as in training
    torch.backends.cudnn.allow_tf32 = False
    weight = (n, n, 4, 4) if kind == "up" else (n, n, 3, 3)
    dtype = str(DTYPE).removeprefix("torch.")
    problem = Layer(kind, direction != "forward", dtype, (16, n, side, side), weight)
    own, exact = problem.expected(DEVICE)

    def excess(form: Form) -> float:
        pairs = zip(problem.results(form, DEVICE), own, exact, strict=True)
        return max(problems.excess(*values) for values in pairs)

    errors = {form: excess(form) for form in problem.forms(DEVICE, "auto")}
    right = [PLAIN, *(form for form, error in errors.items() if error <= 1)]
    first = problem.tensors(DEVICE)
    size = sum(value.nbytes for value in first.values() if value is not None)
    copies = range(1, sets_beyond_cache(size))
    sets = [
        first,
        *({name: value if value is None else value.clone() for name, value in first.items()} for _ in copies),
    ]
    chosen = tuning.form(problem, DEVICE, "auto")
    forms = {"auto": chosen} | {form.name: form for form in right}

    def call(form: Form, number: int) -> object:
        return problem.run(form, sets[number])

    turns, calls = timed({name: partial(call, form) for name, form in forms.items()}, len(sets))
    race(Row("forms", f"{kind} n {n} {px} px {direction}", precision=PRECISION, images=16), turns, calls=calls)
    assert len(right) == 1 + len(errors), (
        f"times the allowed error: {[(form.name, error) for form, error in errors.items()]}"
    )
