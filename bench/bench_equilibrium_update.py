"""One step of k with its log: a dozen small operations, or one kernel on a GPU."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import Case
from fastbegan.measure.results import Row


def bench_equilibrium_update(race_op: Callable[..., Row]) -> None:
    race_op(Case("equilibrium_update", (64, 1, 1, 1, 1)), Row("equilibrium_update", "64 losses"))
