"""Stored uint8 images gathered, mirrored and normalised."""

from __future__ import annotations

from collections.abc import Callable

from bench.cases import ON_CPU, Case
from fastbegan.measure.results import Row


def bench_normalize_images(race_op: Callable[..., Row]) -> None:
    count = 16 if ON_CPU else 64
    case = Case("normalize_images", (count, 3, 64, 64, 3))
    race_op(case, Row("normalize_images", f"{count} images of 64 px", images=count))
