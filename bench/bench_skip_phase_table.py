"""What the decoder's skip connection adds above 16 px, worked out at 8x8."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.cases import ON_CPU, Case
from fastbegan.measure.results import Row


@pytest.mark.parametrize("direction", ["forward", "both"])
def bench_skip_phase_table(direction: str, race_op: Callable[..., Row]) -> None:
    n = 32 if ON_CPU else 128
    case = Case("skip_phase_table", (16, n, 8, 8, n), direction == "both")
    race_op(case, Row("skip_phase_table", f"n {n} {direction}", images=16))
