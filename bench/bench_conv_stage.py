"""A level of the decoder (same, same, up) and of the encoder (same, down); the size is that of the larger map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from bench.cases import Case
from fastbegan.measure.results import Row


@pytest.mark.parametrize("direction", ["forward", "both"])
@pytest.mark.parametrize("level", ["decoder", "encoder"])
def bench_conv_stage(level: str, direction: str, shape: Any, race_op: Callable[..., Row]) -> None:
    px, n, _ = shape
    row = Row("conv_stage", f"{level} n {n} {px} px {direction}", images=16)
    side = px // 2 if level == "decoder" else px
    race_op(Case(level, (16, n, side, side, n), direction == "both"), row)
