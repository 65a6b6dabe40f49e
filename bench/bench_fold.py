"""All weights of a discriminator and a generator, folded and laid out for their layers once a step."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.cases import ON_CPU, Case
from fastbegan.measure.results import Row


@pytest.mark.parametrize("direction", ["forward", "both"])
def bench_fold(direction: str, race_op: Callable[..., Row]) -> None:
    n = 32 if ON_CPU else 128
    row = Row("fold", f"64 px nets, n {n}, {direction}")
    race_op(Case("fold", (1, n, 3, 3, n), direction == "both"), row)
