"""An auto-encoder as in VQGAN and latent diffusion: residual blocks with GroupNorm and SiLU, and resizing.

python examples/latent_decoder.py [--steps 30]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from race import race
from torch import Tensor, nn

from fastbegan.layers import L1ReconstructionLoss


class ResnetBlock(nn.Module):
    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.conv1 = nn.GroupNorm(8, inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = nn.GroupNorm(8, outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.shortcut = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        h = self.conv2(F.silu(self.norm2(h)))
        return self.shortcut(x) + h


class Upsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Downsample(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class LatentAutoEncoder(nn.Module):
    def __init__(self, width: int = 32, channels: int = 4) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), ResnetBlock(width, width), Downsample(width),
            ResnetBlock(width, 2 * width), Downsample(2 * width), ResnetBlock(2 * width, 2 * width),
            nn.GroupNorm(8, 2 * width), nn.SiLU(), nn.Conv2d(2 * width, channels, 3, padding=1),
        )  # fmt: skip
        self.decoder = nn.Sequential(
            nn.Conv2d(channels, 2 * width, 3, padding=1), ResnetBlock(2 * width, 2 * width), Upsample(2 * width),
            ResnetBlock(2 * width, 2 * width), Upsample(2 * width), ResnetBlock(2 * width, width),
            nn.GroupNorm(8, width), nn.SiLU(), nn.Conv2d(width, 3, 3, padding=1),
        )  # fmt: skip

    def forward(self, images: Tensor) -> Tensor:
        return self.decoder(self.encoder(images))


class Reconstruction:
    """The auto-encoder alone, without quantiser and adversary."""

    def __init__(self) -> None:
        self.net = LatentAutoEncoder()
        self.nets: dict[str, nn.Module] = {"auto-encoder": self.net}
        self.optimizer = torch.optim.Adam(self.net.parameters(), 1e-3)
        self.loss = L1ReconstructionLoss()

    def step(self, images: Tensor, z: Tensor) -> dict[str, Tensor]:
        loss = self.loss(self.net(images), images).mean()
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"L1": loss}


if __name__ == "__main__":
    race("latent auto-encoder", Reconstruction)
