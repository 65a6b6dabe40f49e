"""The networks as the paper describes them (§3.5), from torch.nn alone.

They specify `fastbegan.nets.models`, whose outputs must equal theirs. State dicts fit both. The textbook step runs on
these modules, and `fastbegan export --format plain` writes them for use without fastbegan.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig


def _conv(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1)


def _carry(config: ModelConfig) -> Tensor | None:
    """The share of the input in vanishing residuals (§3.5.1), 1 at first; None without them."""
    return torch.ones(()) if config.vanishing else None


def _layer(conv: nn.Module, x: Tensor, carry: Tensor | None) -> Tensor:
    y = F.elu(conv(x))
    return carry * x + (1 - carry) * y if carry is not None and y.shape == x.shape else y


class Encoder(nn.Module):
    """Images [N, 3, size, size] -> codes [N, hidden], without an activation at the end (§3.5).

    Args:
        config: Size, widths and kinds of the layers.
    """

    carry: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stem = _conv(3, config.filters)
        self.levels = nn.ModuleList()
        channels = config.filters
        for level, width in enumerate(config.level_channels):
            stride = 1 if level == len(config.level_channels) - 1 else 2
            convs = [_conv(channels, channels) for _ in range(config.repeats - 1)]
            self.levels.append(nn.ModuleList([*convs, _conv(channels, width, stride)]))
            channels = width
        self.code = nn.Linear(64 * channels, config.hidden)
        self.register_buffer("carry", _carry(config))

    def forward(self, images: Tensor) -> Tensor:
        x = _layer(self.stem, images, None)
        for level in self.levels:
            assert isinstance(level, nn.ModuleList)
            for conv in level:
                x = _layer(conv, x, self.carry)
        return self.code(x.flatten(1))


class Decoder(nn.Module):
    """Codes [N, hidden] -> images [N, 3, size, size], not clipped (§3.5).

    Each level after the first upsamples by nearest neighbours, concatenates h0 (the first 8x8 map) upsampled to the
    same size (`config.skips`, §3.5.1), and convolves.

    Args:
        config: Size, widths and kinds of the layers.
        inputs: Length of a code; None means `config.hidden`.
    """

    carry: Tensor | None

    def __init__(self, config: ModelConfig, inputs: int | None = None) -> None:
        super().__init__()
        n = config.filters
        self.skips = config.skips
        self.expand = nn.Linear(config.hidden if inputs is None else inputs, 64 * n)
        self.levels = nn.ModuleList()
        for level in range(len(config.level_channels)):
            first = _conv(2 * n if level and config.skips else n, n)
            self.levels.append(nn.ModuleList([first, *(_conv(n, n) for _ in range(config.repeats - 1))]))
        self.image = _conv(n, 3)
        self.register_buffer("carry", _carry(config))

    def forward(self, code: Tensor) -> Tensor:
        h0 = self.expand(code).unflatten(1, (-1, 8, 8))  # [N, n, 8, 8]
        if not self.image.weight.is_contiguous():  # a net in channels_last computes in it from here on
            h0 = h0.contiguous(memory_format=torch.channels_last)
        x = h0
        for number, level in enumerate(self.levels):
            if number:
                x = F.interpolate(x, scale_factor=2.0)
                if self.skips:
                    x = torch.cat((x, F.interpolate(h0, scale_factor=float(1 << number))), 1)
            assert isinstance(level, nn.ModuleList)
            for conv in level:
                x = _layer(conv, x, self.carry)
        return self.image(x)


class Generator(Decoder):
    """Latents z [N, latent], uniform in [-1, 1] -> images [N, 3, size, size]: a Decoder with its own weights (§3.5).

    Args:
        config: Size, widths and kinds of the layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, inputs=config.latent)


class Discriminator(nn.Module):
    """The auto-encoder D(v) = Decoder(Encoder(v)): images -> images of the same shape (§3.1, §3.5).

    Args:
        config: Size, widths and kinds of the layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))
