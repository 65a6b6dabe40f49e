"""conv3x3 + bias + ELU, stride 1 and 2; the size is that of its input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.cases import Case
from fastbegan.measure.results import Row


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("kind", ["same", "down"])
def bench_conv2d_elu(kind: str, direction: str, shape: Any, race_op: Callable[..., Row]) -> None:
    px, n, first = shape
    row = Row("conv2d_elu", f"{kind} n {n} {px} px {direction}", images=16)
    race_op(Case(kind, (16, n, px, px, n), direction == "both"), row, search=first and kind == "same")
