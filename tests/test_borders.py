"""What stands before a fast layer gets the gradient that torch's own convolution would give it, in the same format."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbegan.convert import accelerate
from fastbegan.layers import Conv2dELU, UpsampleConv2dELU

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("take_all")]
BEFORE: dict[str, Callable[[], nn.Module]] = {
    **{
        kind.__name__: kind
        for kind in (
            nn.ELU,
            nn.Hardshrink,
            nn.Hardsigmoid,
            nn.Hardtanh,
            nn.Hardswish,
            nn.LeakyReLU,
            nn.LogSigmoid,
            nn.PReLU,
            nn.ReLU,
            nn.ReLU6,
            nn.RReLU,
            nn.SELU,
            nn.CELU,
            nn.GELU,
            nn.Sigmoid,
            nn.SiLU,
            nn.Mish,
            nn.Softplus,
            nn.Softshrink,
            nn.Softsign,
            nn.Tanh,
            nn.Tanhshrink,
            nn.Softmax2d,
            nn.Dropout,
            nn.Dropout2d,
            nn.AlphaDropout,
            nn.FeatureAlphaDropout,
            nn.Identity,
        )
    },
    "Threshold": lambda: nn.Threshold(0.1, 0.0),
    "GLU": lambda: nn.GLU(1),
    "Softmin": lambda: nn.Softmin(1),
    "Softmax": lambda: nn.Softmax(3),
    "LogSoftmax": lambda: nn.LogSoftmax(1),
    "BatchNorm2d": lambda: nn.BatchNorm2d(8),
    "BatchNorm2d, not affine": lambda: nn.BatchNorm2d(8, affine=False),
    "BatchNorm2d, no statistics": lambda: nn.BatchNorm2d(8, track_running_stats=False),
    "InstanceNorm2d": lambda: nn.InstanceNorm2d(8),
    "InstanceNorm2d, affine": lambda: nn.InstanceNorm2d(8, affine=True),
    "InstanceNorm2d, statistics": lambda: nn.InstanceNorm2d(8, track_running_stats=True),
    "GroupNorm of 1": lambda: nn.GroupNorm(1, 8),
    "GroupNorm of 2": lambda: nn.GroupNorm(2, 8),
    "GroupNorm of 8": lambda: nn.GroupNorm(8, 8),
    "LayerNorm": lambda: nn.LayerNorm([8, 8, 8]),
    "LayerNorm of rows": lambda: nn.LayerNorm(8),
    "RMSNorm": lambda: nn.RMSNorm([8, 8]),
    "LocalResponseNorm": lambda: nn.LocalResponseNorm(3),
    "MaxPool2d": lambda: nn.MaxPool2d(2),
    "AvgPool2d": lambda: nn.AvgPool2d(2),
    "LPPool2d": lambda: nn.LPPool2d(2, 2),
    "AdaptiveAvgPool2d": lambda: nn.AdaptiveAvgPool2d(3),
    "AdaptiveMaxPool2d": lambda: nn.AdaptiveMaxPool2d(3),
    "FractionalMaxPool2d": lambda: nn.FractionalMaxPool2d(2, output_size=3),
    "ReflectionPad2d": lambda: nn.ReflectionPad2d(1),
    "ReplicationPad2d": lambda: nn.ReplicationPad2d(1),
    "ZeroPad2d": lambda: nn.ZeroPad2d(2),
    "ConstantPad2d": lambda: nn.ConstantPad2d(1, 0.5),
    "CircularPad2d": lambda: nn.CircularPad2d(1),
    "Conv2d": lambda: nn.Conv2d(8, 6, 3, padding=1),
    "Conv2d 1x1": lambda: nn.Conv2d(8, 6, 1),
    "Conv2d 5x5": lambda: nn.Conv2d(8, 6, 5, padding=2),
    "Conv2d dilated": lambda: nn.Conv2d(8, 6, 3, dilation=2),
    "Conv2d in groups": lambda: nn.Conv2d(8, 6, 3, groups=2),
    "Conv2d depthwise": lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8),
    "Conv2d of stride 2": lambda: nn.Conv2d(8, 6, 4, 2, 1),
    "Conv2d to one channel": lambda: nn.Conv2d(8, 1, 5, padding=2),
    "Conv2d with reflection": lambda: nn.Conv2d(8, 8, 3, padding=1, padding_mode="reflect"),
    "ConvTranspose2d": lambda: nn.ConvTranspose2d(8, 6, 4, 2, 1),
    "ConvTranspose2d 3x3": lambda: nn.ConvTranspose2d(8, 6, 3, padding=1),
    "Upsample bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "Upsample bicubic": lambda: nn.Upsample(scale_factor=2, mode="bicubic"),
    "Upsample by 3": lambda: nn.Upsample(scale_factor=3),
    "Upsample by 2": lambda: nn.Upsample(scale_factor=2),
    "UpsamplingBilinear2d": lambda: nn.UpsamplingBilinear2d(scale_factor=2),
    "PixelShuffle": lambda: nn.PixelShuffle(2),
    "PixelUnshuffle": lambda: nn.PixelUnshuffle(2),
    "ChannelShuffle": lambda: nn.ChannelShuffle(2),
    "Flatten and Unflatten": lambda: nn.Sequential(nn.Flatten(), nn.Linear(512, 512), nn.Unflatten(1, (8, 8, 8))),
    "Linear over rows": lambda: nn.Linear(8, 6),
    "Unfold and Fold": lambda: nn.Sequential(nn.Unfold(3, padding=1), nn.Fold((8, 8), 3, padding=1)),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(8, 8, 5, padding=2)),
    "weight norm": lambda: nn.utils.parametrizations.weight_norm(nn.Conv2d(8, 8, 5, padding=2)),
}


def _gradients(model: nn.Module, x: Tensor) -> list[Tensor]:
    torch.manual_seed(1)
    x = x.detach().requires_grad_()
    y = model(x)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype)
    return list(torch.autograd.grad((y * weights).sum(), [x, *model.parameters()]))


def test_there_are_seventy() -> None:
    assert len(BEFORE) >= 70


@pytest.mark.parametrize(
    ("batch", "memory_format"),
    [
        (1, torch.contiguous_format),
        *(pytest.param(batch, torch.channels_last, marks=pytest.mark.slow) for batch in (1, 2)),
        pytest.param(2, torch.contiguous_format, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow) if isinstance(make, type) and number % 4 else name
        for number, (name, make) in enumerate(BEFORE.items())
    ],
)
def test_gradients_before_an_accelerated_layer(name: str, batch: int, memory_format: torch.memory_format) -> None:
    """Behind a layer that stays as it is, so that the gradient goes on through `name`."""
    torch.manual_seed(0)
    first = nn.Conv2d(4, 8, 5, padding=2)
    before = BEFORE[name]()
    channels = before(first(torch.zeros(2, 4, 8, 8))).shape[1]
    parts = (first, before, nn.Upsample(scale_factor=2), nn.Conv2d(channels, 6, 3, padding=1), nn.ELU())
    plain: Any = nn.Sequential(*parts).double()
    plain.to(memory_format=memory_format)
    x = torch.randn(batch, 4, 8, 8, dtype=torch.float64).contiguous(memory_format=memory_format)
    fast = accelerate(copy.deepcopy(plain), example=x)
    assert "3" in fast.fastbegan_report.replaced
    for got, expected in zip(_gradients(fast, x), _gradients(plain, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-11)


class _Views(torch.autograd.Function):
    """Doubles the gradient through a view of it, as torch's contiguous layers let one do."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        return (grad.view(grad.shape[0], -1) * 2).view(grad.shape)


def _layers() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    block = (nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1), nn.ELU())
    return {
        "accelerated": accelerate(nn.Sequential(*block, nn.Conv2d(4, 4, 3, padding=1))),
        "accelerated, silu": accelerate(nn.Sequential(nn.Conv2d(4, 4, 3, 2, 1), nn.SiLU())),
        "up": UpsampleConv2dELU(4, 4),
        "same": Conv2dELU(4, 4),
    }


@pytest.mark.parametrize("name", list(_layers()))
def test_views_of_outputs_and_of_gradients(name: str) -> None:
    """DCGAN's `out.view(len(out), -1)` behind a layer, and a user's function before it."""
    layer, x = _layers()[name], torch.randn(2, 4, 6, 6, requires_grad=True)
    y = layer(_Views.apply(x))
    (doubled,) = torch.autograd.grad(y.view(len(y), -1).square().sum(), x)
    (gradient,) = torch.autograd.grad(layer(x).square().sum(), x)
    torch.testing.assert_close(doubled, 2 * gradient)
