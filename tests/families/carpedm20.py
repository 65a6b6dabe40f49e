"""BEGAN's generator and auto-encoder in the manner of carpedm20's BEGAN-pytorch."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn


def _conv_elu(inputs: int, outputs: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(inputs, outputs, 3, stride, 1), nn.ELU(True)]


def _decoder(width: int, repeat_num: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for idx in range(repeat_num):
        layers += [*_conv_elu(width, width), *_conv_elu(width, width)]
        if idx < repeat_num - 1:
            layers.append(nn.UpsamplingNearest2d(scale_factor=2))
    layers.append(nn.Conv2d(width, 3, 3, 1, 1))
    return nn.Sequential(*layers)


def _encoder(width: int, repeat_num: int, pool: bool) -> nn.Sequential:
    layers, before = _conv_elu(3, width), width
    for idx in range(repeat_num):
        now, last = width * (idx + 1), idx == repeat_num - 1
        layers += _conv_elu(before, now)
        layers += _conv_elu(now, now, stride=1 if last or pool else 2)
        if pool and not last:
            layers.append(nn.AvgPool2d(2))
        before = now
    return nn.Sequential(*layers)


def _spread(main: Callable[[Tensor], Tensor], x: Tensor, num_gpu: int) -> Tensor:
    if isinstance(x.data, torch.cuda.FloatTensor) and num_gpu > 1:  # pyright: ignore[reportAttributeAccessIssue]
        return nn.parallel.data_parallel(main, x, range(num_gpu))  # pyright: ignore[reportArgumentType]
    return main(x)


class GeneratorCNN(nn.Module):
    """Latents [N, Z] -> images [N, 3, S, S], with S of 8 * 2^(repeat_num - 1)."""

    def __init__(self, z_num: int = 16, hidden_num: int = 16, repeat_num: int = 3, num_gpu: int = 1) -> None:
        super().__init__()
        self.num_gpu = num_gpu
        self.initial_conv_dim = [hidden_num, 8, 8]
        self.fc = nn.Linear(z_num, math.prod(self.initial_conv_dim))
        self.conv = _decoder(hidden_num, repeat_num)

    def main(self, x: Tensor) -> Tensor:
        fc_out = self.fc(x).view([-1, *self.initial_conv_dim])
        return self.conv(fc_out)

    def forward(self, x: Tensor) -> Tensor:
        return _spread(self.main, x, self.num_gpu)


class DiscriminatorCNN(nn.Module):
    """Images [N, 3, S, S] -> [N, 3, S, S] through codes [N, Z], subsampled by stride or by means."""

    def __init__(
        self, z_num: int = 16, hidden_num: int = 16, repeat_num: int = 3, pool: bool = False, num_gpu: int = 1
    ) -> None:
        super().__init__()
        self.num_gpu = num_gpu
        self.conv1_output_dim, self.conv2_input_dim = [hidden_num * repeat_num, 8, 8], [hidden_num, 8, 8]
        self.conv1 = _encoder(hidden_num, repeat_num, pool)
        self.fc1 = nn.Linear(math.prod(self.conv1_output_dim), z_num)
        self.fc2 = nn.Linear(z_num, math.prod(self.conv2_input_dim))
        self.conv2 = _decoder(hidden_num, repeat_num)

    def main(self, x: Tensor) -> Tensor:
        conv1_out = self.conv1(x).view(-1, math.prod(self.conv1_output_dim))
        fc1_out = self.fc1(conv1_out)
        fc2_out = self.fc2(fc1_out).view([-1, *self.conv2_input_dim])
        return self.conv2(fc2_out)

    def forward(self, x: Tensor) -> Tensor:
        return _spread(self.main, x, self.num_gpu)
