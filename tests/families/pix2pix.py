"""The U-Net of pix2pix, by transposed convolutions or by upsampling, and its PatchGAN discriminator."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn


def uses_bias(norm_layer: Any) -> bool:
    """Whether a convolution before this norm has a bias, which only InstanceNorm leaves to it."""
    if type(norm_layer) is functools.partial:
        return norm_layer.func == nn.InstanceNorm2d
    return norm_layer == nn.InstanceNorm2d


def _doubled(inputs: int, outputs: int, up: str, bias: bool) -> list[nn.Module]:
    if up == "transposed":
        return [nn.ConvTranspose2d(inputs, outputs, kernel_size=4, stride=2, padding=1, bias=bias)]
    doubling = nn.Upsample(scale_factor=2, mode="nearest")
    if up == "reflect":
        return [doubling, nn.ReflectionPad2d(1), nn.Conv2d(inputs, outputs, kernel_size=3, stride=1, bias=bias)]
    return [doubling, nn.Conv2d(inputs, outputs, kernel_size=3, stride=1, padding=1, bias=bias)]


class UnetSkipConnectionBlock(nn.Module):
    """A level around the one below; the activation in place below changes the map that is concatenated here."""

    def __init__(
        self,
        outer: int,
        inner: int,
        submodule: nn.Module | None = None,
        outermost: bool = False,
        norm_layer: Any = nn.BatchNorm2d,
        dropout: bool = False,
        up: str = "transposed",
    ) -> None:
        super().__init__()
        self.outermost = outermost
        innermost, bias = submodule is None, uses_bias(norm_layer)
        downconv = nn.Conv2d(3 if outermost else outer, inner, kernel_size=4, stride=2, padding=1, bias=bias)
        downrelu, uprelu = nn.LeakyReLU(0.2, True), nn.ReLU(True)
        upconv = _doubled(inner if innermost else inner * 2, outer, up, bias or outermost)
        if outermost:
            assert submodule is not None
            model = [downconv, submodule, uprelu, *upconv, nn.Tanh()]
        elif submodule is None:
            model = [downrelu, downconv, uprelu, *upconv, norm_layer(outer)]
        else:
            model = [downrelu, downconv, norm_layer(inner), submodule, uprelu, *upconv, norm_layer(outer)]
            if dropout:
                model = [*model, nn.Dropout(0.5)]
        self.model = nn.Sequential(*model)

    def forward(self, x: Tensor) -> Tensor:
        if self.outermost:
            return self.model(x)
        return torch.cat([x, self.model(x)], 1)


class UnetGenerator(nn.Module):
    """Images [N, 3, S, S] -> [N, 3, S, S], for S a multiple of 2^num_downs."""

    def __init__(
        self,
        num_downs: int = 6,
        ngf: int = 8,
        norm_layer: Any = nn.BatchNorm2d,
        dropout: bool = True,
        up: str = "transposed",
    ) -> None:
        super().__init__()
        level = functools.partial(UnetSkipConnectionBlock, norm_layer=norm_layer, up=up)
        block = level(ngf * 8, ngf * 8)
        for _ in range(num_downs - 5):
            block = level(ngf * 8, ngf * 8, submodule=block, dropout=dropout)
        for times in (4, 2, 1):
            block = level(ngf * times, ngf * times * 2, submodule=block)
        self.model = level(3, ngf, submodule=block, outermost=True)

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)


class NLayerDiscriminator(nn.Module):
    """Pairs of images [N, 6, S, S] -> a map of logits [N, 1, S/8 - 2, S/8 - 2] with three layers."""

    def __init__(self, ndf: int = 8, n_layers: int = 3, norm_layer: Any = nn.BatchNorm2d) -> None:
        super().__init__()
        bias = uses_bias(norm_layer)
        sequence: list[nn.Module] = [nn.Conv2d(6, ndf, kernel_size=4, stride=2, padding=1), nn.LeakyReLU(0.2, True)]
        mult = 1
        for n in range(1, n_layers + 1):
            before, mult = mult, min(2**n, 8)
            stride = 2 if n < n_layers else 1
            sequence += [
                nn.Conv2d(ndf * before, ndf * mult, kernel_size=4, stride=stride, padding=1, bias=bias),
                norm_layer(ndf * mult),
                nn.LeakyReLU(0.2, True),
            ]
        sequence += [nn.Conv2d(ndf * mult, 1, kernel_size=4, stride=1, padding=1)]
        self.model = nn.Sequential(*sequence)

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)
