"""Nearest x2 + conv3x3 + bias + ELU; the size is that of its result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.cases import Case
from fastbegan.measure.results import Row


@pytest.mark.parametrize("direction", ["forward", "both"])
def bench_upsample_conv2d_elu(direction: str, shape: Any, race_op: Callable[..., Row]) -> None:
    px, n, first = shape
    row = Row("upsample_conv2d_elu", f"n {n} to {px} px {direction}", images=16)
    race_op(Case("up", (16, n, px // 2, px // 2, n), direction == "both"), row, search=first)
