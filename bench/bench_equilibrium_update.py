"""One step of k with its log: a dozen small operations, or one kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable

from bench.gpu_cases import Case
from fastbegan.measure.results import Row


def bench_equilibrium_update(race_op: Callable[..., Row]) -> None:
    case = Case("time", "equilibrium_update", shape=(64,) * 5)
    race_op(case, Row("equilibrium_update", "64 losses"), backward=False)
