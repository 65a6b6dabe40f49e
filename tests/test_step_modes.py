"""Which draw, which scale, which average: what a step does around its gradients, in every mode."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbegan import ModelConfig, TrainConfig, TrainStep
from fastbegan.nets.models import Discriminator, Generator, build
from fastbegan.training.objective import OBJECTIVES

MODEL = ModelConfig(size=16, filters=4, hidden=6, latent=6, widths=(1, 2))
TRAIN = TrainConfig(batch_size=3, lr=1e-3)
_WAYS = [("simultaneous", "shared"), ("simultaneous", "independent"), ("alternating", "independent")]
MODES = [(passes, *way) for passes in OBJECTIVES for way in _WAYS]
EVERY = pytest.mark.parametrize(("passes", "updates", "latents"), MODES)


def _step(dtype: torch.dtype | None = None, **options: Any) -> TrainStep:
    return TrainStep(*build(MODEL, seed=0), replace(TRAIN, **options), dtype)


def _batch() -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(1)
    real = torch.rand(3, 3, 16, 16).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
    return real, torch.rand(3, 6) * 2 - 1, torch.rand(3, 6) * 2 - 1


def _watch(step: TrainStep) -> dict[str, list[Tensor]]:
    """The gradients that each optimizer gets, kept as they are when it does."""
    seen: dict[str, list[Tensor]] = {}
    for name, optimizer in (("D", step.optimizer_d), ("G", step.optimizer_g)):

        def keep(optimizer: torch.optim.Optimizer, *_: object, name: str = name) -> None:
            groups = optimizer.param_groups
            seen[name] = [p.grad.clone() for group in groups for p in group["params"] if p.grad is not None]

        optimizer.register_step_pre_hook(keep)
    return seen


@EVERY
def test_each_player_gets_its_own_draw(passes: str, updates: str, latents: str) -> None:
    step = _step(passes=passes, updates=updates, latents=latents)
    step.equilibrium.k.fill_(0.4)
    seen = _watch(step)
    real, z_d, z_g = _batch()
    z_g = z_d if latents == "shared" else z_g
    twin = _step()
    textbook = OBJECTIVES["textbook"](twin.generator, twin.discriminator, torch.tensor(0.4))
    (loss_real,) = textbook.for_discriminator(real, z_d)
    expected_d = [p.grad.clone() for p in twin.discriminator.parameters() if p.grad is not None]
    step(real, z_d, z_g)
    if updates == "alternating":
        twin.discriminator.load_state_dict(step.discriminator.state_dict())
    (loss_fake,) = textbook.for_generator(z_g)
    expected_g = [p.grad for p in twin.generator.parameters() if p.grad is not None]
    for got, want in zip((*seen["D"], *seen["G"]), (*expected_d, *expected_g), strict=True):
        assert (got - want).norm() <= 1e-4 * want.norm()
    row = step.equilibrium.read()
    assert row["loss_real"] == pytest.approx(loss_real.item(), rel=1e-5)
    assert row["loss_fake"] == pytest.approx(loss_fake.item(), rel=1e-5)


@EVERY
def test_fp16_gradients_are_those_of_float32(passes: str, updates: str, latents: str) -> None:
    """Scaled up in half precision, and down again before anyone sees them."""
    real, z_d, z_g = _batch()
    found = []
    for dtype in (None, torch.float16):
        step = _step(dtype, passes=passes, updates=updates, latents=latents, lr=1e-6)
        step.equilibrium.k.fill_(0.4)
        seen = _watch(step)
        step(real, z_d, z_d if latents == "shared" else z_g)
        assert step.found_bad.item() == 0
        found.append(torch.cat([gradient.flatten() for name in "DG" for gradient in seen[name]]))
    assert (found[1] - found[0]).norm() <= 2e-2 * found[0].norm()


def test_the_loss_scale_grows_and_falls() -> None:
    step = _step(torch.float16)
    real, z, _ = _batch()
    step.loss_scale.fill_(64.0)
    step.good_steps.fill_(1998)
    seen = []
    for _ in range(3):
        step(real, z, z)
        seen.append((step.loss_scale.item(), step.good_steps.item()))
    assert seen == [(64.0, 1999.0), (128.0, 0.0), (128.0, 1.0)]
    step.good_steps.fill_(5)
    handle = next(step.generator.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    step(real, z, z)
    handle.remove()
    assert (step.loss_scale.item(), step.good_steps.item()) == (64.0, 0.0)


def test_the_average_begins_with_a_ramp() -> None:
    step = _step(ema_half_life=1000.0)
    before = [p.detach().clone() for p in step.average.parameters()]
    real, z, _ = _batch()
    step(real, z, z)
    share = 1 - 2 ** (-3 / (0.05 * 3 * 1))  # half-life: a twentieth of the images seen
    for old, average, weight in zip(before, step.average.parameters(), step.generator.parameters(), strict=True):
        torch.testing.assert_close(average, old + share * (weight.detach() - old))


def test_options_reach_the_nets() -> None:
    assert _step(recompute=True).discriminator.encoder.recompute
    assert not _step().discriminator.encoder.recompute


@pytest.mark.parametrize(
    ("updates", "latents", "packs"),
    [
        ("simultaneous", "shared", [1, 1]),
        ("simultaneous", "independent", [1, 1]),
        ("alternating", "shared", [2, 2]),  # D's weights change in between
    ],
)
@pytest.mark.parametrize("passes", ["single-pass", "joint"])
def test_weights_are_packed_once_an_update(
    passes: str, updates: str, latents: str, packs: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    step = _step(passes=passes, updates=updates, latents=latents)
    packed: list[str] = []
    for net in (Generator, Discriminator):
        pack = net.pack
        monkeypatch.setattr(
            net, "pack", lambda self, dtype=None, pack=pack: (packed.append(type(self).__name__), pack(self, dtype))[1]
        )
    real, z_d, z_g = _batch()
    step(real, z_d, z_d if latents == "shared" else z_g)
    assert [packed.count("Generator"), packed.count("Discriminator")] == packs


@pytest.mark.parametrize("passes", ["single-pass", "joint"])
def test_halves_that_are_alike_cancel_in_float32(passes: str) -> None:
    """At k = 1 and x = G(z) D's gradient is nothing; half precision would leave its rounding."""
    nets = build(MODEL, seed=0)
    _, z, _ = _batch()
    with torch.no_grad():
        real = nets[0](z, nets[0].pack(torch.bfloat16)).float()
    found = []
    for k in (0.999, 0.0):
        for net in nets:
            net.zero_grad()
        OBJECTIVES[passes](*nets, torch.tensor(k), dtype=torch.bfloat16).for_both(real, z, z)
        found.append(torch.cat([p.grad.flatten() for p in nets[1].parameters() if p.grad is not None]))
    assert (found[0] - 0.001 * found[1]).norm() <= 1e-2 * 0.001 * found[1].norm()  # in bf16 k would have been 1


def test_textbook_words_and_options() -> None:
    assert _step(passes="textbook", updates="alternating").describe() == "textbook: textbook, D three times"
    assert "once more for G (independent z)" in _step(latents="independent").describe()
