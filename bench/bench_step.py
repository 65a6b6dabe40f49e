"""The gradients of one training step against the textbook: eager PyTorch, plain layers, D called three times."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import pytest
import torch
from torch import Tensor, nn

from fastbegan.config import ModelConfig
from fastbegan.models import build
from fastbegan.objective import Objective, frozen

K = 0.1


def _textbook(generator: nn.Module, discriminator: nn.Module, real: Tensor, z: Tensor) -> None:
    """L_D = L(x) - k L(G(z)) on D, then L_G = L(G(z)) on G, without D's weight gradients."""

    def loss(v: Tensor) -> Tensor:
        return (v - discriminator(v)).abs().mean()

    fake = generator(z)
    (loss(real) - K * loss(fake.detach())).backward()
    with frozen(discriminator):
        loss(fake).backward()


def _clear(*nets: nn.Module) -> None:
    for net in nets:
        net.zero_grad(set_to_none=True)


def _gradients(nets: Iterable[nn.Module]) -> list[Tensor]:
    return [p.grad for net in nets for p in net.parameters() if p.grad is not None]


@pytest.mark.parametrize(("size", "filters"), [(32, 16), (32, 32), (64, 32)])
def bench_step(
    size: int, filters: int, compare: Callable[..., float], request: pytest.FixtureRequest, device: torch.device,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if request.config.getoption("--quick") and size > 32:
        pytest.skip("not in --quick")
    torch.manual_seed(0)
    nets = build(ModelConfig(size=size, filters=filters), seed=0, device=device)
    real = torch.rand(16, 3, size, size, device=device).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
    z, k = torch.rand(16, 64, device=device) * 2 - 1, torch.tensor(K, device=device)
    objective = Objective(*nets)

    def baseline() -> None:
        monkeypatch.setenv("FASTBEGAN_IMPL", "reference")
        _clear(*nets)
        _textbook(*nets, real, z)

    def candidate() -> None:
        monkeypatch.delenv("FASTBEGAN_IMPL")
        _clear(*nets)
        objective.shared(real, z, k)

    baseline()
    expected = [g.clone() for g in _gradients(nets)]
    candidate()
    for got, want in zip(_gradients(nets), expected, strict=True):  # never time what is not right
        # exact in float64 (tests/test_objective.py); in float32 rounding turns the sign of a few pixels' errors
        assert (got - want).norm() <= 1e-3 * want.norm()
    compare(baseline, candidate)
