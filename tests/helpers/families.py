"""Models in the common styles of published code, none of which knows fastbegan."""

from __future__ import annotations

import types
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn


def sequential(width: int = 8) -> nn.Module:
    """A decoder as one nn.Sequential."""
    return nn.Sequential(
        nn.Linear(6, width * 16),
        nn.Unflatten(1, (width, 4, 4)),
        nn.Upsample(scale_factor=2),
        nn.Conv2d(width, width, 3, padding=1),
        nn.ELU(inplace=True),
        nn.Upsample(scale_factor=2, mode="nearest"),
        nn.Conv2d(width, width, 3, 1, 1),
        nn.ELU(True),
        nn.Conv2d(width, width, 3, 1, 1),
        nn.ELU(True),
        nn.UpsamplingNearest2d(scale_factor=2),
        nn.Conv2d(width, 3, 3, 1, "same"),
        nn.Tanh(),
    )


class Interpolating(nn.Module):
    """A list of convolutions; resizing and activation are functions."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(6, 6, 3, padding=1) for _ in range(3))
        self.last = nn.Conv2d(6, 3, 3, padding=1)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: Tensor, raw: bool = False) -> Tensor:
        for conv in self.convs:
            x = F.elu(conv(F.interpolate(x, scale_factor=2)))
        return x if raw else torch.sigmoid(self.last(x))


class Residual(nn.Module):
    """Blocks that add in place, one after another."""

    class Block(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(width, width, 3, 1, 1), nn.Conv2d(width, width, 3, 1, 1, bias=False)
            self.act = nn.LeakyReLU(0.2, inplace=True)

        def forward(self, x: Tensor) -> Tensor:
            y = self.second(self.act(self.first(x)))
            y += x
            return self.act(y)

    class Up(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.up, self.conv = nn.Upsample(scale_factor=2.0), nn.Conv2d(width, width, 3, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(self.up(x))
            return y.add_(1.0)

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 6, 3, 2, 1), nn.ReLU(), self.Block(6), self.Up(6), self.Block(6))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class UNet(nn.Module):
    """Down by stride, up by nearest neighbours, with concatenation."""

    def __init__(self, width: int = 5) -> None:
        super().__init__()
        self.inc = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.ReLU(inplace=True))
        self.down1 = nn.Sequential(nn.Conv2d(width, 2 * width, 3, 2, 1), nn.ReLU(inplace=True))
        self.down2 = nn.Sequential(nn.Conv2d(2 * width, 2 * width, 3, 2, 1), nn.SiLU())
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.up1 = nn.Sequential(nn.Conv2d(4 * width, width, 3, padding=1), nn.ReLU(inplace=True))
        self.up2 = nn.Conv2d(2 * width, width, 3, padding=1)
        self.outc = nn.Conv2d(width, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        a = self.inc(x)
        b = self.down1(a)
        c = self.down2(b)
        y = self.up1(torch.cat([b, self.up(c)], dim=1))
        y = F.relu(self.up2(torch.cat((a, self.up(y)), 1)), inplace=True)
        return {"image": self.outc(y), "code": c}


class Normalised(nn.Module):
    """BatchNorm between convolution and activation."""

    def __init__(self) -> None:
        super().__init__()
        blocks = [
            nn.Sequential(
                nn.Upsample(scale_factor=2), nn.Conv2d(6, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6), nn.ReLU(True)
            )
            for _ in range(2)
        ]
        self.net = nn.Sequential(*blocks, nn.Conv2d(6, 3, 3, padding=1), nn.ELU(0.7))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Reparametrised(nn.Module):
    """Weight and spectral norm, by torch's parametrizations."""

    def __init__(self) -> None:
        super().__init__()
        norms = torch.nn.utils.parametrizations
        self.a = norms.weight_norm(nn.Conv2d(4, 6, 3, padding=1))
        self.b = norms.spectral_norm(nn.Conv2d(6, 6, 3, 2, 1))
        self.c = norms.weight_norm(nn.Conv2d(6, 4, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.a(F.interpolate(x, scale_factor=2, mode="nearest")), 0.1)
        return F.leaky_relu(self.c(F.leaky_relu(self.b(x), 0.1)), negative_slope=0.1)


class Latent(nn.Module):
    """An encoder and a decoder as in latent diffusion and VQGAN: GroupNorm, SiLU, padding at the end."""

    class ResnetBlock(nn.Module):
        def __init__(self, width: int, out: int) -> None:
            super().__init__()
            self.norm1, self.conv1 = nn.GroupNorm(2, width), nn.Conv2d(width, out, 3, 1, 1)
            self.norm2, self.conv2 = nn.GroupNorm(2, out), nn.Conv2d(out, out, 3, 1, 1)
            self.dropout = nn.Dropout(0.0)
            self.shortcut = nn.Conv2d(width, out, 1) if width != out else nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            h = self.conv1(F.silu(self.norm1(x)))
            h = self.conv2(self.dropout(F.silu(self.norm2(h))))
            return self.shortcut(x) + h

    class Downsample(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, 3, stride=2, padding=0)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.pad(x, (0, 1, 0, 1), mode="constant", value=0))

    class Upsample(nn.Module):
        def __init__(self, width: int) -> None:
            super().__init__()
            self.conv = nn.Conv2d(width, width, kernel_size=3, stride=1, padding=1)

        def forward(self, x: Tensor) -> Tensor:
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))

    def __init__(self, width: int = 4) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, width, 3, 1, 1)
        self.down = nn.ModuleList([self.ResnetBlock(width, 2 * width), self.Downsample(2 * width)])
        self.up = nn.ModuleList([self.Upsample(2 * width), self.ResnetBlock(2 * width, width)])
        self.norm_out, self.conv_out = nn.GroupNorm(2, width), nn.Conv2d(width, 3, 3, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv_in(x)
        for layer in (*self.down, *self.up):
            x = layer(x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Equalised(nn.Module):
    """Weights that the forward makes, as in progressive and style GANs."""

    class Conv(nn.Module):
        def __init__(self, inputs: int, outputs: int, window: int = 3) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(outputs, inputs, window, window))
            self.bias = nn.Parameter(torch.randn(outputs))
            self.gain, self.padding = (2 / (inputs * window**2)) ** 0.5, window // 2

        def forward(self, x: Tensor) -> Tensor:
            return F.conv2d(x, self.weight * self.gain, self.bias, padding=self.padding)

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two, self.five = self.Conv(4, 6), self.Conv(6, 6), self.Conv(6, 6, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.leaky_relu(self.one(F.interpolate(x, scale_factor=2)), 0.2)
        return F.leaky_relu(self.five(F.leaky_relu(self.two(x), 0.2)), 0.2)


def images(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


FAMILIES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "sequential": (sequential, (3, 6), 4),
    "interpolating": (Interpolating, (2, 6, 4, 6), 4),
    "residual": (Residual, (2, 3, 8, 8), 4),
    "unet": (UNet, (2, 3, 8, 12), 6),
    "normalised": (Normalised, (3, 6, 4, 4), 3),
    "reparametrised": (Reparametrised, (2, 4, 6, 6), 3),
    "latent": (Latent, (2, 3, 8, 8), 7),
    "equalised": (Equalised, (2, 4, 6, 6), 2),
}
"""How a family is made, the shape of its input, and how many of its layers are taken."""


class Base(nn.Module):
    """Something of everything; a test gives the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.other = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1, bias=False)
        self.act, self.up, self.linear = nn.ELU(), nn.Upsample(scale_factor=2), nn.Linear(3 * 36, 2)
        self.convs = nn.ModuleList([nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1)])
        self.acts = nn.ModuleDict({"e": nn.ELU()})
        self.layers = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ELU(), nn.Conv2d(3, 3, 3, padding=1), nn.ELU())
        self._gain, self.table, self.function = 1.0, {"gain": 1.0, "counts": {"calls": 0}}, F.elu
        self.config, self.kept = types.SimpleNamespace(gain=1.0), deque()
        self.root_two = np.sqrt(2)
        self.register_parameter("shift", None)


def made(forward: Callable[[Any, Tensor], Any]) -> Any:
    """A model of this forward."""
    torch.manual_seed(0)
    return type("Made", (Base,), {"forward": forward})()
