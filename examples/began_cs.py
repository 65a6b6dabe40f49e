"""BEGAN-CS (Chang et al., ECCV 2018): BEGAN with a constraint on the latent space, which draws E(G(z)) to z.

python examples/began_cs.py [--steps 30]
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from race import race
from torch import Tensor, nn

from fastbegan.layers import Equilibrium, L1ReconstructionLoss, LatentL1Loss


def _conv(inputs: int, outputs: int, stride: int = 1) -> tuple[nn.Module, nn.Module]:
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1), nn.ELU()


class Decoder(nn.Module):
    def __init__(self, width: int = 32, levels: int = 3) -> None:
        super().__init__()
        self.width = width
        self.start = nn.Linear(64, width * 64)
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2 * levels))
        self.image = nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, code: Tensor) -> Tensor:
        x = self.start(code).view(-1, self.width, 8, 8)
        for number, conv in enumerate(self.convs):
            if number and number % 2 == 0:
                x = F.interpolate(x, scale_factor=2)
            x = F.elu(conv(x))
        return self.image(x)


class Encoder(nn.Module):
    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.convs = nn.Sequential(
            *_conv(3, width),
            *_conv(width, width),
            *_conv(width, 2 * width, stride=2),
            *_conv(2 * width, 2 * width),
            *_conv(2 * width, 3 * width, stride=2),
            *_conv(3 * width, 3 * width),
        )
        self.code = nn.Linear(3 * width * 64, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.code(self.convs(images).flatten(1))


class BEGANCS:
    """BEGAN's equilibrium; D's loss has 0.1 times the L1 distance between E(G(z)) and z added."""

    def __init__(self) -> None:
        self.generator = Decoder()
        self.encoder, self.decoder = Encoder(), Decoder()
        self.nets: dict[str, nn.Module] = {"generator": self.generator}
        self.nets |= {"encoder": self.encoder, "decoder": self.decoder}
        self.for_g = torch.optim.Adam(self.generator.parameters(), 1e-4)
        self.for_d = torch.optim.Adam([*self.encoder.parameters(), *self.decoder.parameters()], 1e-4)
        self.loss, self.latent = L1ReconstructionLoss(), LatentL1Loss()
        self.equilibrium = Equilibrium(gamma=0.5)

    def step(self, images: Tensor, z: Tensor) -> dict[str, Tensor]:
        self.equilibrium.to(images.device)
        k = self.equilibrium.k.clone()
        fake = self.generator(z)
        loss_real = self.loss(self.decoder(self.encoder(images)), images).mean()
        code = self.encoder(fake.detach())
        loss_fake = self.loss(self.decoder(code), fake.detach()).mean()
        loss_d = loss_real - k * loss_fake + 0.1 * self.latent(code, z).mean()
        self.for_d.zero_grad()
        loss_d.backward()
        self.for_d.step()
        loss_g = self.loss(self.decoder(self.encoder(fake)), fake).mean()
        self.for_g.zero_grad()
        loss_g.backward()
        self.for_g.step()
        self.equilibrium.update(loss_real, loss_g.detach())
        return {"L(x)": loss_real, "L(G(z))": loss_g, "k": self.equilibrium.k}


if __name__ == "__main__":
    race("BEGAN-CS", BEGANCS)
