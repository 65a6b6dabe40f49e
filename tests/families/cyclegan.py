"""The ResNet generator of CycleGAN."""

from __future__ import annotations

import functools
from typing import Any

from torch import Tensor, nn

from .pix2pix import uses_bias

INSTANCE = functools.partial(nn.InstanceNorm2d, affine=False, track_running_stats=False)


class ResnetBlock(nn.Module):
    """Maps [N, C, H, W] -> [N, C, H, W], padded as asked before each convolution."""

    def __init__(self, dim: int, padding_type: str, norm_layer: Any, use_dropout: bool, use_bias: bool) -> None:
        super().__init__()
        block: list[nn.Module] = []
        for last in (False, True):
            p = 0
            if padding_type == "reflect":
                block += [nn.ReflectionPad2d(1)]
            elif padding_type == "replicate":
                block += [nn.ReplicationPad2d(1)]
            elif padding_type == "zero":
                p = 1
            else:
                raise ValueError(f"padding_type is {padding_type!r}; accepted: reflect, replicate, zero")
            block += [nn.Conv2d(dim, dim, kernel_size=3, padding=p, bias=use_bias), norm_layer(dim)]
            if not last:
                block += [nn.ReLU(True)]
                if use_dropout:
                    block += [nn.Dropout(0.5)]
        self.conv_block = nn.Sequential(*block)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """Images [N, 3, S, S] -> [N, 3, S, S], by transposed convolutions or by upsampling."""

    def __init__(
        self,
        ngf: int = 16,
        n_blocks: int = 2,
        norm_layer: Any = INSTANCE,
        use_dropout: bool = False,
        padding_type: str = "reflect",
        upsample: bool = False,
    ) -> None:
        assert n_blocks >= 0
        super().__init__()
        bias = uses_bias(norm_layer)
        model: list[nn.Module] = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, kernel_size=7, padding=0, bias=bias)]
        model += [norm_layer(ngf), nn.ReLU(True)]
        for mult in (1, 2):
            down = nn.Conv2d(ngf * mult, ngf * mult * 2, kernel_size=3, stride=2, padding=1, bias=bias)
            model += [down, norm_layer(ngf * mult * 2), nn.ReLU(True)]
        for _ in range(n_blocks):
            model += [ResnetBlock(ngf * 4, padding_type, norm_layer, use_dropout, bias)]
        for mult in (4, 2):
            inputs, outputs = ngf * mult, ngf * mult // 2
            if upsample:
                model += [nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, stride=1, padding=1, bias=bias)]
            else:
                model += [nn.ConvTranspose2d(inputs, outputs, 3, stride=2, padding=1, output_padding=1, bias=bias)]
            model += [norm_layer(outputs), nn.ReLU(True)]
        model += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, kernel_size=7, padding=0), nn.Tanh()]
        self.model = nn.Sequential(*model)

    def forward(self, input: Tensor) -> Tensor:
        return self.model(input)
