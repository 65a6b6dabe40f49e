"""Encoder, Decoder (= Generator) and Discriminator of BEGAN (paper §3.5)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config import ModelConfig
from .layers import Conv2dELU, UpsampleConv2dELU


def _register_carry(module: nn.Module, config: ModelConfig) -> None:
    # in the state dict, so that a generator exported while layers still fade in samples as it trained
    module.register_buffer("carry", torch.ones(()) if config.vanishing else None)


class Encoder(nn.Module):
    """Images [N, 3, size, size] -> codes [N, hidden], no activation at the end.

    Each level has `repeats` convolutions; the last of them changes the width and, but on the 8x8 level, halves the
    resolution by stride 2 (a conv followed by sub-sampling is that conv at stride 2).
    """

    carry: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.stem = Conv2dELU(3, config.filters)
        self.levels = nn.ModuleList()
        channels = config.filters
        for level, width in enumerate(config.level_channels):
            last = level == len(config.level_channels) - 1
            convs = [Conv2dELU(channels, channels) for _ in range(config.repeats - 1)]
            convs.append(Conv2dELU(channels, width, stride=1 if last else 2))
            self.levels.append(nn.ModuleList(convs))
            channels = width
        self.code = nn.Linear(64 * channels, config.hidden)
        _register_carry(self, config)

    def forward(self, images: Tensor) -> Tensor:
        x = self.stem(images)
        for level in self.levels:
            assert isinstance(level, nn.ModuleList)
            for conv in level:
                x = conv(x, self.carry)
        return self.code(x.flatten(1))


class Decoder(nn.Module):
    """Codes [N, hidden] -> images [N, 3, size, size], linear at the end (clip only when saving).

    With skips, h0 (the 8x8 tensor) is upsampled and concatenated after every upsampling (§3.5.1). Both are nearest,
    so concatenating before the last doubling is the same and the layer that follows doubles both at once.
    """

    carry: Tensor | None

    def __init__(self, config: ModelConfig, inputs: int | None = None) -> None:
        super().__init__()
        n = config.filters
        self.skips = config.skips
        self.expand = nn.Linear(config.hidden if inputs is None else inputs, 64 * n)
        self.levels = nn.ModuleList()
        for level in range(len(config.level_channels)):
            first = UpsampleConv2dELU(2 * n if config.skips else n, n) if level else Conv2dELU(n, n)
            rest = (Conv2dELU(n, n) for _ in range(config.repeats - 1))
            self.levels.append(nn.ModuleList([first, *rest]))
        self.image = Conv2dELU(n, 3, activation="none")
        _register_carry(self, config)

    def forward(self, code: Tensor) -> Tensor:
        h0 = self.expand(code).unflatten(1, (-1, 8, 8)).contiguous(memory_format=torch.channels_last)
        x = h0  # [N, n, 8, 8]
        for index, level in enumerate(self.levels):
            if index and self.skips:
                h = h0 if index == 1 else F.interpolate(h0, scale_factor=float(1 << (index - 1)), mode="nearest")
                x = torch.cat((x, h), dim=1)  # [N, 2n, H / 2, W / 2]
            assert isinstance(level, nn.ModuleList)
            for conv in level:
                x = conv(x, self.carry)  # [N, n, H, W]
        return self.image(x)


class Generator(Decoder):
    """Latents z [N, latent], uniform in [-1, 1] -> images [N, 3, size, size]: a Decoder with its own weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, inputs=config.latent)


class Discriminator(nn.Module):
    """The auto-encoder D(v) = Decoder(Encoder(v)): [N, 3, size, size] -> [N, 3, size, size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


def build(config: ModelConfig, *, seed: int, device: torch.device | str = "cpu") -> tuple[Generator, Discriminator]:
    """G and D with weights that depend on `seed` only (made on the CPU), in channels_last, on `device`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, discriminator = Generator(config), Discriminator(config)
    nets = (generator, discriminator)
    for net in nets:
        net.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return nets


def count_parameters(*modules: nn.Module) -> int:
    """Number of trainable values, biases included."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
