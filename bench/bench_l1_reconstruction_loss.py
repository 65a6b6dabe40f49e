"""The pixel-wise loss: forward, both ways, and losses with their gradients in one pass, as the step takes them."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.cases import ON_CPU, Case
from fastbegan.measure.results import Row

HUGE = 1 << (24 if ON_CPU else 28)  # bytes a tensor, so that no cache holds it


@pytest.mark.parametrize("what", ["forward", "both", "one pass"])
def bench_l1_reconstruction_loss(what: str, quick: bool, race_op: Callable[..., Row]) -> None:
    samples = (HUGE >> 2 if quick else HUGE) // (3 * 64 * 64 * 4)
    row = Row("l1_reconstruction_loss", f"{samples} images of 64 px, {what}", images=samples)
    op = "l1_reconstruction_loss" + ("_with_gradients" if what == "one pass" else "")
    race_op(Case(op, (samples, 3, 64, 64, 3), what == "both"), row)
