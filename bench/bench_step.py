"""A training step against the textbook: eager PyTorch, plain modules, D called three times."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastbegan import ModelConfig, TrainConfig, TrainStep
from fastbegan.models import build
from fastbegan.objective import OBJECTIVES


@pytest.mark.parametrize("passes", ["single-pass", "joint"])
@pytest.mark.parametrize(("size", "filters"), [(32, 16), (32, 32), (64, 32)])
def bench_step(
    size: int, filters: int, passes: str, compare: Callable[..., float], request: pytest.FixtureRequest,
    device: torch.device,
) -> None:  # fmt: skip
    if request.config.getoption("--quick") and size > 32:
        pytest.skip("not in --quick")
    torch.manual_seed(0)
    model = ModelConfig(size=size, filters=filters)
    real = torch.rand(16, 3, size, size, device=device).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
    z, k = torch.rand(16, 64, device=device) * 2 - 1, torch.tensor(0.1, device=device)

    def gradients(how: str) -> list[Tensor]:
        nets = build(model, seed=0, device=device)
        OBJECTIVES[how](*nets).shared(real, z, k)
        return [p.grad for net in nets for p in net.parameters() if p.grad is not None]

    for got, want in zip(gradients(passes), gradients("textbook"), strict=True):  # never time what is not right
        # exact in float64 (tests/test_objective.py); in float32 rounding turns the sign of a few pixels' errors
        assert (got - want).norm() <= 1e-3 * want.norm()
    baseline, candidate = (
        TrainStep(*build(model, seed=0, device=device), replace(TrainConfig(), passes=how))
        for how in ("textbook", passes)
    )
    compare(lambda: baseline(real, z, z), lambda: candidate(real, z, z))
