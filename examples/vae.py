"""A convolutional variational auto-encoder (arXiv 1312.6114) whose decoder resizes and convolves.

python examples/vae.py [--steps 30]
"""

from __future__ import annotations

import torch
from race import race
from torch import Tensor, nn

from fastbegan.layers import L2ReconstructionLoss


def _up(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True))


def _down(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, stride=2, padding=1), nn.ReLU(inplace=True)


class Encoder(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.convs = nn.Sequential(*_down(3, width), *_down(width, 2 * width))
        self.mean, self.log_variance = nn.Linear(2 * width * 64, 64), nn.Linear(2 * width * 64, 64)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        x = self.convs(images).flatten(1)
        return self.mean(x), self.log_variance(x)


class Decoder(nn.Module):
    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.start = nn.Sequential(nn.Linear(64, width * 64), nn.ReLU(), nn.Unflatten(1, (width, 8, 8)))
        self.ups = nn.Sequential(_up(width, width), _up(width, width // 2))
        self.image = nn.Sequential(nn.Conv2d(width // 2, 3, 3, padding=1), nn.Tanh())

    def forward(self, code: Tensor) -> Tensor:
        return self.image(self.ups(self.start(code)))


class VAE:
    """The evidence lower bound with a Gaussian likelihood; z is the source of the noise."""

    def __init__(self) -> None:
        self.encoder, self.decoder = Encoder(), Decoder()
        self.nets: dict[str, nn.Module] = {"encoder": self.encoder, "decoder": self.decoder}
        self.optimizer = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], 1e-3)
        self.loss = L2ReconstructionLoss()

    def step(self, images: Tensor, z: Tensor) -> dict[str, Tensor]:
        mean, log_variance = self.encoder(images)
        # uniform z in [-1, 1] to normal noise
        noise = torch.special.ndtri(0.5 + 0.499 * z)
        error = self.loss(self.decoder(mean + (0.5 * log_variance).exp() * noise), images).mean()
        divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()
        loss = error + 1e-4 * divergence
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        return {"error": error, "divergence": divergence}


if __name__ == "__main__":
    race("VAE", VAE)
