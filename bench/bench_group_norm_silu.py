"""GroupNorm and SiLU at the sizes of a VAE's decoder, forward and both ways, in channels_last."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from bench.cases import ON_CPU, Case
from fastbegan.measure.results import Row

SHAPES = [(4, 128, 32, 32, 32)] if ON_CPU else [(8, 512, 64, 64, 32), (8, 128, 512, 512, 32), (64, 128, 64, 64, 32)]


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("vae_shape", SHAPES, ids=str)
def bench_group_norm_silu(
    vae_shape: tuple[int, int, int, int, int], backward: bool, race_op: Callable[..., Row]
) -> None:
    samples, channels, height, _, groups = vae_shape
    name = f"{samples}x{channels} {height} px {groups} groups, {'both' if backward else 'forward'}"
    race_op(Case("group_norm_silu", vae_shape, backward), Row("group_norm_silu", name, images=samples))
