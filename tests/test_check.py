"""check=: what is right passes, norms behind biases and kinks included; what is wrong is refused."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from fastbegan.convert import accelerate, calls, compare
from tests.helpers.gans import GANS, seeded

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("take_all")]
EVERY = pytest.mark.parametrize("name", GANS)


def _passes(name: str, seed: int, training: bool) -> None:
    net, x = seeded(name, seed)
    accelerate(net.train(training), check=x)
    assert net.fastbegan_report.checked.startswith("checked: largest relative error")  # pyright: ignore


@EVERY
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_healthy_nets_pass(name: str, training: bool) -> None:
    _passes(name, 0, training)
    _passes(name, 1, training)


@EVERY
@pytest.mark.slow
def test_healthy_nets_pass_with_twenty_seeds(name: str) -> None:
    for seed in range(20):
        for training in (True, False):
            _passes(name, seed, training)


@pytest.mark.parametrize("norm", [nn.BatchNorm2d(16), nn.InstanceNorm2d(16), nn.GroupNorm(16, 16)])
def test_a_bias_whose_gradient_is_nothing(norm: nn.Module) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(16, 16, 3, padding=1), norm, nn.LeakyReLU(0.2))
    accelerate(model, check=torch.randn(4, 16, 16, 16))


def test_wide_layers_are_held_to_channels_last_too() -> None:
    """oneDNN's sums over 256 channels are several times less exact there, in torch's own layers as in ours."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(256, 256, 3, padding=1))
    assert "largest relative error" in accelerate(model, check=torch.randn(1, 256, 16, 16)).fastbegan_report.checked  # pyright: ignore


class _Faulty(torch.autograd.Function):
    """x; going back, what `fault` makes of the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, fault: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.fault = fault
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return ctx.fault(grads[0]), None


def _without_a_row(gradient: Tensor) -> Tensor:
    gradient = gradient.clone()
    gradient[:, :, 0] = 0
    return gradient


def _a_wrong_row(y: Tensor) -> Tensor:
    y = y.clone()
    y[:, :, -1] *= 1.001
    return y


FAULTS: dict[str, tuple[str, Callable[[Tensor], Tensor]]] = {
    "a bias gradient that is too large": ("bias", lambda gradient: 1.01 * gradient),
    "a bias gradient of another channel": ("bias", lambda gradient: gradient.roll(1)),
    "no bias gradient": ("bias", torch.zeros_like),
    "a weight gradient upside down": ("weight", lambda gradient: gradient.transpose(2, 3)),
    "a weight gradient with its channels exchanged": (
        "weight",
        lambda gradient: gradient.transpose(0, 1) if gradient.shape[0] == gradient.shape[1] else gradient.flip(0),
    ),
    "an input gradient without its first row": ("x", _without_a_row),
    "an output whose last row is wrong": ("y", _a_wrong_row),
}


@pytest.mark.parametrize(
    "net",
    [
        pytest.param("EBGAN's generator", marks=pytest.mark.slow),
        pytest.param("BEGAN's discriminator", marks=pytest.mark.slow),
        "f-AnoGAN's discriminator",
    ],
)
@pytest.mark.parametrize(
    "fault",
    [name if name in list(FAULTS)[1::3] else pytest.param(name, marks=pytest.mark.slow) for name in FAULTS],
)
def test_planted_faults_are_refused(net: str, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, change = FAULTS[fault]
    real = calls.conv_stage

    def faulty(x: Tensor, weights: Any, biases: Any, **options: Any) -> Tensor:
        x = _Faulty.apply(x, change) if where == "x" else x
        weights = [_Faulty.apply(value, change) if where == "weight" else value for value in weights]
        biases = [_Faulty.apply(value, change) if where == "bias" else value for value in biases]
        y = real(x, weights, biases, **options)
        return change(y) if where == "y" else y

    monkeypatch.setattr(calls, "conv_stage", faulty)
    for seed in range(3):
        model, x = seeded(net, 2 * seed)
        if where == "bias" and net == "EBGAN's generator":
            model = _without_norms(model)  # before a norm a bias has no gradient that could be wrong
        with pytest.raises(RuntimeError, match=r"the check failed: the error of .* the model was restored"):
            accelerate(model, check=x)
        assert not any("forward" in vars(module) for module in model.modules())


def _without_norms(model: nn.Module) -> nn.Module:
    for module in list(model.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm2d):
                setattr(module, name, nn.Identity())
    return model


GRADIENT = "gradient of 0.weight"


@pytest.mark.parametrize(
    ("passing", "left"), [((True, True, False), 0), ((False, True, True), 0), ((True, False, False), 1)]
)
def test_a_kink_is_excused_by_two_of_three_draws(passing: tuple[bool, ...], left: int) -> None:
    def compare_at(draw: int) -> compare.Comparison:
        if not passing[draw] and not draw:
            raise ValueError("images must be in [0, 1]")
        return compare.Comparison({GRADIENT: (0.0, 0.1 * draw)} if passing[draw] else {}, {})

    found = compare.excuse(compare.Comparison({}, {GRADIENT: "far"}), compare_at)
    assert len(found.too_far) == left and (left or found.near[GRADIENT][1] > 0)
    outputs = compare.Comparison({}, {"output 0": "far"})  # has no kinks
    assert compare.excuse(outputs, compare_at).too_far
    if left:
        with pytest.raises(RuntimeError, match="the check failed: far; the model was restored"):
            found.require_near()


def test_inputs_are_moved_by_a_thousandth() -> None:
    example = (torch.full((100,), 20.0), {"index": torch.arange(3), "none": torch.zeros(100)}, torch.ones(4).half(), 7)
    draws = [compare.moved(example, draw) for draw in range(3)]
    for x, named, half, number in draws:
        assert 0.005 < (x - example[0]).abs().mean() < 0.05 and 0.0002 < named["none"].abs().mean() < 0.005
        assert torch.equal(named["index"], torch.arange(3)) and half.dtype == torch.float16 and number == 7
    assert not torch.equal(draws[0][0], draws[1][0]) and torch.equal(draws[0][0], compare.moved(example, 0)[0])


class _AtAKink(nn.Module):
    """Before the ReLU exactly 0, but for rounding, wherever the input is 1."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(64, 8, 3, padding=1)
        self.conv.bias.data = -self.conv.weight.data.sum((1, 2, 3))  # pyright: ignore[reportOptionalMemberAccess]

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(nn.functional.interpolate(x, scale_factor=2)))


def test_a_model_at_a_kink_passes() -> None:
    torch.manual_seed(0)
    model = _AtAKink()
    accelerate(model, check=torch.ones(2, 64, 6, 6))
    words = model.fastbegan_report.checked  # pyright: ignore
    assert "; kinks at " in str(words) and "compared at inputs moved by a thousandth" in str(words)


class _Counting(nn.Module):
    """Counts what it sees in buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(self.conv(self.norm(x)))


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
@pytest.mark.parametrize("call", range(4))
def test_nothing_is_left_of_a_check_that_was_cut_off(
    call: int, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, x = _Counting(), torch.randn(2, 3, 6, 6)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    calls = 0

    def failing(*_: object, **__: object) -> Tensor:
        nonlocal calls
        calls += 1
        if calls > call:
            raise error
        return x.sum()

    monkeypatch.setattr(compare, "_weighted", failing)
    with contextlib.suppress(BaseException):
        accelerate(model, check=x)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert model.training and all(one.grad is None for one in model.parameters())


def test_a_fault_of_special_values_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """Moved inputs have none of them: an output is never excused."""
    real = calls.conv_stage
    monkeypatch.setattr(calls, "conv_stage", lambda x, *a, **o: real(x, *a, **o) * (2 if x.abs().min() == 0 else 1))
    with pytest.raises(RuntimeError, match="the check failed: the error of output 0"):
        accelerate(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ELU()), check=torch.rand(1, 3, 8, 8).round())


@pytest.mark.parametrize("check", [[torch.zeros(1, 3, 4, 4)], True, "x", np.zeros(3)])
def test_a_check_of_the_wrong_kind_is_named(check: object) -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ELU())
    message = rf"check is a {type(check).__name__}; accepted: a tensor, a dict, or a tuple of the forward's arguments"
    with pytest.raises(TypeError, match=message):
        accelerate(model, check=check)
    assert "forward" not in vars(model)
