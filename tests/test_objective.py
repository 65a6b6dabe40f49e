"""Gradients of both players against the paper's formulas, literally, in float64."""

from __future__ import annotations

from typing import Literal

import pytest
import torch
from torch import Tensor, nn

from fastbegan import Discriminator, Generator, ModelConfig
from fastbegan.config import ObjectiveConfig
from fastbegan.nets.models import build
from fastbegan.training.objective import OBJECTIVES, Objective

pytestmark = pytest.mark.core
K = torch.tensor(0.37)
EVERY = pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=OBJECTIVES)


def _nets(*, vanishing: bool = False) -> tuple[Generator, Discriminator, Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    config = ModelConfig(size=32, filters=3, hidden=6, latent=5, vanishing=vanishing)
    generator, discriminator = Generator(config).double(), Discriminator(config).double()
    for name, buffer in (*generator.named_buffers(), *discriminator.named_buffers()):
        assert name.endswith("carry")
        buffer.fill_(0.3)
    real = torch.rand(3, 3, 32, 32, dtype=torch.float64) * 2 - 1
    z_d, z_g = (torch.rand(3, 5, dtype=torch.float64) * 2 - 1 for _ in range(2))
    return generator, discriminator, real, z_d, z_g


def _gradients(net: nn.Module) -> list[Tensor]:
    gradients = [p.grad for p in net.parameters()]
    assert all(g is not None for g in gradients)
    return [g.clone() for g in gradients if g is not None]


def _textbook(
    generator: Generator, discriminator: Discriminator, real: Tensor, z_d: Tensor, z_g: Tensor, eta: Literal[1, 2]
) -> tuple[list[Tensor], list[Tensor], float, float]:
    """L_D = L(x) - k L(G(z_D)) on D, L_G = L(G(z_G)) on G, L(v) = mean |v - D(v)|^eta, each on its own."""

    def loss(v: Tensor) -> Tensor:
        return (v - discriminator(v)).abs().pow(eta).mean()

    loss_d = loss(real) - K.double() * loss(generator(z_d).detach())
    loss_g = loss(generator(z_g))
    on_d = torch.autograd.grad(loss_d, list(discriminator.parameters()))
    on_g = torch.autograd.grad(loss_g, list(generator.parameters()))
    return list(on_d), list(on_g), loss(real).item(), loss_g.item()


def _check(got: list[Tensor], expected: list[Tensor]) -> None:
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-13)


@EVERY
@pytest.mark.parametrize("vanishing", [False, True])
@pytest.mark.parametrize("eta", [1, 2])
def test_both_players_gradients(objective: type[Objective], eta: Literal[1, 2], vanishing: bool) -> None:
    generator, discriminator, real, z, _ = _nets(vanishing=vanishing)
    on_d, on_g, real_loss, fake_loss = _textbook(generator, discriminator, real, z, z, eta)
    losses = objective(generator, discriminator, K, ObjectiveConfig(eta=eta)).for_both(real, z, z)
    assert [v.item() for v in losses] == [pytest.approx(real_loss, rel=1e-12), pytest.approx(fake_loss, rel=1e-12)]
    _check(_gradients(discriminator), on_d)
    _check(_gradients(generator), on_g)


@EVERY
def test_at_k_zero(objective: type[Objective]) -> None:
    generator, discriminator, real, z, _ = _nets()
    objective(generator, discriminator, torch.zeros(())).for_both(real, z, z)
    expected = torch.autograd.grad((real - discriminator(real)).abs().mean(), list(discriminator.parameters()))
    _check(_gradients(discriminator), list(expected))


@EVERY
@pytest.mark.parametrize("eta", [1, 2])
def test_independent_draws(objective: type[Objective], eta: Literal[1, 2]) -> None:
    generator, discriminator, real, z_d, z_g = _nets()
    on_d, on_g, real_loss, fake_loss = _textbook(generator, discriminator, real, z_d, z_g, eta)
    config = ObjectiveConfig(eta=eta, latents="independent")
    gradients = objective(generator, discriminator, K.double(), config)
    (loss_g,) = gradients.for_generator(z_g)
    assert all(p.grad is None for p in discriminator.parameters())  # G's pass asks nothing of D's weights
    (loss_d,) = gradients.for_discriminator(real, z_d)
    _check(_gradients(discriminator), on_d)
    _check(_gradients(generator), on_g)
    assert [loss_d.item(), loss_g.item()] == [pytest.approx(real_loss, rel=1e-12), pytest.approx(fake_loss, rel=1e-12)]
    for net in (generator, discriminator):
        net.zero_grad()
    together = gradients.for_both(real, z_d, z_g)
    _check(_gradients(discriminator), on_d)
    _check(_gradients(generator), on_g)
    assert [loss.item() for loss in together] == [loss_d.item(), loss_g.item()]


@EVERY
def test_generator_gradient_flows_through_both_sides(objective: type[Objective]) -> None:
    generator, discriminator, _, _, z = _nets()
    objective(generator, discriminator, K).for_generator(z)
    fake = generator(z)
    one_sided = torch.autograd.grad((fake.detach() - discriminator(fake)).abs().mean(), list(generator.parameters()))
    assert not torch.allclose(_gradients(generator)[0], one_sided[0])


@EVERY
def test_loss_scale_scales_both(objective: type[Objective]) -> None:
    generator, discriminator, real, z, _ = _nets()
    on_d, on_g, *_ = _textbook(generator, discriminator, real, z, z, 1)
    scale = torch.tensor(1024.0, dtype=torch.float64)
    for latents in ("shared", "independent"):
        for net in (generator, discriminator):
            net.zero_grad()
        config = ObjectiveConfig(latents=latents)
        objective(generator, discriminator, K, config, loss_scale=scale).for_both(real, z, z)
        _check(_gradients(discriminator), [1024 * g for g in on_d])
        _check(_gradients(generator), [1024 * g for g in on_g])


@pytest.mark.parametrize("eta", [1, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("passes", ["single-pass", "joint"])
def test_rounding_is_at_most_twice_the_textbooks(passes: str, dtype: torch.dtype, eta: Literal[1, 2]) -> None:
    """In float32, and in bf16 with float32 weights, losses and k; the textbook then under autocast."""
    generator, discriminator, real, z, _ = _nets()
    on_d, on_g, *_ = _textbook(generator, discriminator, real, z, z, eta)
    exact = torch.cat([g.flatten() for g in (*on_g, *on_d)])
    for net in (generator, discriminator):
        net.float()
    errors = []
    for how in ("textbook", passes):
        for net in (generator, discriminator):
            net.zero_grad()
        compute = None if dtype == torch.float32 else dtype
        objective = OBJECTIVES[how](generator, discriminator, K, ObjectiveConfig(eta=eta), dtype=compute)
        losses = objective.for_both(real.float(), z.float(), z.float())
        assert all(loss.dtype == torch.float32 for loss in losses)
        found = torch.cat([g.flatten() for g in (*_gradients(generator), *_gradients(discriminator))])
        assert found.dtype == torch.float32
        errors.append((found - exact).norm().item())
    assert 0 < errors[1] <= 2 * errors[0] + 1e-6 * exact.norm().item()


@pytest.mark.parametrize("passes", ["single-pass", pytest.param("joint", marks=pytest.mark.slow)])
def test_a_step_on_the_kernels(passes: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole nets through the fused tier, under the interpreter where there is no GPU."""
    pytest.importorskip("triton")
    on_gpu = torch.cuda.is_available()
    batch, size, widths = (2, 32, (2, 3, 3)) if on_gpu else (1, 16, (1, 1))
    config = ModelConfig(size=size, filters=4, hidden=4, latent=5, widths=widths, repeats=1 + on_gpu)
    nets = build(config, seed=0, device="cuda" if on_gpu else "cpu")
    device = next(nets[0].parameters()).device
    real, z = torch.rand(batch, 3, size, size, device=device) * 2 - 1, torch.rand(batch, 5, device=device)
    found = []
    for how in ("textbook", passes):
        if how == passes:
            monkeypatch.setenv("FASTBEGAN_IMPL", "fused")
        for net in nets:
            net.zero_grad()
        losses = OBJECTIVES[how](*nets, K.to(device), ObjectiveConfig(eta=2)).for_both(real, z, z)
        found.append([*losses, *(p.grad for net in nets for p in net.parameters() if p.grad is not None)])
    for got, want in zip(found[1], found[0], strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()
