"""EBGAN (arXiv 1609.03126): D is an auto-encoder, its error the energy; with a margin and the pull-away term.

python examples/ebgan.py [--steps 30]
"""

from __future__ import annotations

import torch
from race import race
from torch import Tensor, nn

from fastbegan.layers import HingeLoss, L2ReconstructionLoss, PullAwayTerm


def _up(inputs: int, outputs: int) -> tuple[nn.Module, nn.Module]:
    return nn.Upsample(scale_factor=2), nn.Conv2d(inputs, outputs, 3, padding=1)


class Generator(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.width = width
        self.start = nn.Linear(64, width * 64)
        self.body = nn.Sequential(
            *_up(width, width),
            nn.LeakyReLU(0.2),
            *_up(width, width),
            nn.LeakyReLU(0.2),
            nn.Conv2d(width, 3, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.body(self.start(z).view(-1, self.width, 8, 8))


class AutoEncoder(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            nn.Conv2d(3, width, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(width, 2 * width, 3, 2, 1), nn.LeakyReLU(0.2)
        )
        self.decoder = nn.Sequential(*_up(2 * width, width), nn.LeakyReLU(0.2), *_up(width, 3), nn.Tanh())

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        code = self.encoder(images)
        return self.decoder(code), code


class EBGAN:
    """D raises the energy of generated images up to a margin of 0.2; the pull-away term spreads codes in a batch."""

    def __init__(self) -> None:
        self.generator, self.discriminator = Generator(), AutoEncoder()
        self.nets: dict[str, nn.Module] = {"generator": self.generator, "discriminator": self.discriminator}
        self.for_g = torch.optim.Adam(self.generator.parameters(), 1e-3, (0.5, 0.999))
        self.for_d = torch.optim.Adam(self.discriminator.parameters(), 1e-3, (0.5, 0.999))
        self.energy, self.hinge, self.pull_away = L2ReconstructionLoss(), HingeLoss(0.2), PullAwayTerm()

    def step(self, images: Tensor, z: Tensor) -> dict[str, Tensor]:
        fake = self.generator(z)
        real_energy = self.energy(self.discriminator(images)[0], images)
        fake_energy = self.energy(self.discriminator(fake.detach())[0], fake.detach())
        loss_d = real_energy.mean() + self.hinge(fake_energy).mean()
        self.for_d.zero_grad()
        loss_d.backward()
        self.for_d.step()
        rebuilt, code = self.discriminator(fake)
        loss_g = self.energy(rebuilt, fake).mean() + 0.1 * self.pull_away(code)
        self.for_g.zero_grad()
        loss_g.backward()
        self.for_g.step()
        return {"loss D": loss_d, "loss G": loss_g}


if __name__ == "__main__":
    race("EBGAN", EBGAN)
