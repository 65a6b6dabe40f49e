"""Generators and discriminators as the field's repositories build them, small: norms behind biases, kinks, dropout."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn


def _up(inputs: int, outputs: int) -> list[nn.Module]:
    """A block of DCGAN with upsampling; the norm's epsilon is that of PyTorch-GAN."""
    convolution = nn.Conv2d(inputs, outputs, 3, stride=1, padding=1)
    return [nn.Upsample(scale_factor=2), convolution, nn.BatchNorm2d(outputs, 0.8), nn.LeakyReLU(0.2, inplace=True)]


class DCGANGenerator(nn.Module):
    """Latents [N, 12] -> images [N, 3, 32, 32]; EBGAN's and BEGAN's in PyTorch-GAN are the same."""

    def __init__(self, latent: int = 12, width: int = 16) -> None:
        super().__init__()
        self.width = width
        self.l1 = nn.Sequential(nn.Linear(latent, width * 8**2))
        self.conv_blocks = nn.Sequential(
            nn.BatchNorm2d(width),
            *_up(width, width),
            *_up(width, width // 2),
            nn.Conv2d(width // 2, 3, 3, stride=1, padding=1),
            nn.Tanh(),
        )

    def forward(self, noise: Tensor) -> Tensor:
        out = self.l1(noise)
        return self.conv_blocks(out.view(out.shape[0], self.width, 8, 8))


class DCGANDiscriminator(nn.Module):
    """Images [N, 3, 32, 32] -> [N, 1]; dropout, and a view of the last map."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        blocks: list[nn.Module] = []
        for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 4 * width)):
            blocks += [nn.Conv2d(inputs, outputs, 3, 2, 1), nn.LeakyReLU(0.2, inplace=True), nn.Dropout2d(0.25)]
            blocks += [nn.BatchNorm2d(outputs, 0.8)] if inputs > 3 else []
        self.model = nn.Sequential(*blocks)
        self.adv_layer = nn.Sequential(nn.Linear(4 * width * 4**2, 1), nn.Sigmoid())

    def forward(self, img: Tensor) -> Tensor:
        out = self.model(img)
        return self.adv_layer(out.view(out.shape[0], -1))


class EBGANDiscriminator(nn.Module):
    """An auto-encoder with a narrow code: images [N, 3, 32, 32] -> images and codes."""

    def __init__(self, width: int = 12, code: int = 8) -> None:
        super().__init__()
        self.down = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1), nn.ReLU())
        self.down_size, self.width = 16, width
        inside = width * self.down_size**2
        self.embedding = nn.Linear(inside, code)
        self.fc = nn.Sequential(
            nn.BatchNorm1d(code, 0.8), nn.ReLU(inplace=True), nn.Linear(code, inside), nn.BatchNorm1d(inside), nn.ReLU()
        )
        self.up = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, 3, 3, 1, 1))

    def forward(self, img: Tensor) -> tuple[Tensor, Tensor]:
        out = self.down(img)
        code = self.embedding(out.view(out.size(0), -1))
        out = self.fc(code)
        return self.up(out.view(out.size(0), self.width, self.down_size, self.down_size)), code


class BEGANDiscriminator(nn.Module):
    """An auto-encoder of BEGAN's paper in torch's words: ELU, halving by stride, a linear code, no norm."""

    def __init__(self, width: int = 8, code: int = 8) -> None:
        super().__init__()
        conv = lambda a, b, stride=1: nn.Conv2d(a, b, 3, stride, 1)  # noqa: E731
        self.encoder = nn.Sequential(
            conv(3, width),
            nn.ELU(True),
            conv(width, width),
            nn.ELU(True),
            conv(width, 2 * width, 2),
            nn.ELU(True),
            conv(2 * width, 2 * width),
            nn.ELU(True),
            conv(2 * width, 3 * width, 2),
            nn.ELU(True),
            nn.Flatten(),
            nn.Linear(3 * width * 8**2, code),
        )
        self.decoder = nn.Sequential(
            nn.Linear(code, width * 8**2),
            nn.Unflatten(1, (width, 8, 8)),
            conv(width, width),
            nn.ELU(True),
            nn.UpsamplingNearest2d(scale_factor=2),
            conv(width, width),
            nn.ELU(True),
            conv(width, width),
            nn.ELU(True),
            nn.UpsamplingNearest2d(scale_factor=2),
            conv(width, width),
            nn.ELU(True),
            conv(width, 3),
            nn.Tanh(),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.decoder(self.encoder(x))


class _Block(nn.Module):
    """A block of f-AnoGAN (WGAN-GP's ResNet): norm, ReLU, convolution, twice, beside a 1x1 shortcut."""

    def __init__(self, inputs: int, outputs: int, norm: Callable[[int], nn.Module], resize: nn.Module, *, up: bool):
        super().__init__()
        first, second = nn.Conv2d(inputs, outputs, 3, padding=1), nn.Conv2d(outputs, outputs, 3, padding=1)
        doubled, halved = ([resize], []) if up else ([], [resize])
        self.main = nn.Sequential(norm(inputs), nn.ReLU(), *doubled, first, norm(outputs), nn.ReLU(), second, *halved)
        self.shortcut = nn.Sequential(*doubled, nn.Conv2d(inputs, outputs, 1), *halved)

    def forward(self, x: Tensor) -> Tensor:
        return self.shortcut(x) + self.main(x)


class AnoGANGenerator(nn.Module):
    """Latents [N, 12] -> images [N, 1, 32, 32]."""

    def __init__(self, latent: int = 12, width: int = 12) -> None:
        super().__init__()
        self.first, self.width = nn.Linear(latent, width * 4**2), width
        self.blocks = nn.Sequential(
            *(_Block(width, width, nn.BatchNorm2d, nn.Upsample(scale_factor=2), up=True) for _ in range(3)),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, 1, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return self.blocks(self.first(z).view(-1, self.width, 4, 4))


class AnoGANDiscriminator(nn.Module):
    """Images [N, 1, 32, 32] -> critics [N]; a norm over each sample, as gradient penalties want it."""

    def __init__(self, width: int = 12) -> None:
        super().__init__()
        norm = lambda channels: nn.GroupNorm(1, channels)  # noqa: E731
        self.first = nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.LeakyReLU(0.2))
        self.blocks = nn.Sequential(*(_Block(width, width, norm, nn.AvgPool2d(2), up=False) for _ in range(3)))
        self.last = nn.Linear(width * 4**2, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.first(x))
        return self.last(x.view(len(x), -1)).view(-1)


def weights_init(module: nn.Module) -> None:
    """DCGAN's, by class name."""
    name = module.__class__.__name__
    if name.find("Conv") != -1:
        nn.init.normal_(module.weight.data, 0.0, 0.02)  # pyright: ignore[reportArgumentType]
    elif name.find("BatchNorm2d") != -1:
        nn.init.normal_(module.weight.data, 1.0, 0.02)  # pyright: ignore[reportArgumentType]
        nn.init.constant_(module.bias.data, 0.0)  # pyright: ignore[reportArgumentType]


GANS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "DCGAN's generator": (DCGANGenerator, (4, 12)),
    "DCGAN's discriminator": (DCGANDiscriminator, (4, 3, 32, 32)),
    "EBGAN's generator": (lambda: DCGANGenerator(20, 24), (6, 20)),
    "EBGAN's discriminator": (EBGANDiscriminator, (4, 3, 32, 32)),
    "BEGAN's generator": (lambda: BEGANDiscriminator(code=10).decoder, (4, 10)),
    "BEGAN's discriminator": (BEGANDiscriminator, (4, 3, 32, 32)),
    "f-AnoGAN's generator": (AnoGANGenerator, (4, 12)),
    "f-AnoGAN's discriminator": (AnoGANDiscriminator, (4, 1, 32, 32)),
}
"""How a net is made, and the shape of its input."""


def seeded(name: str, seed: int) -> tuple[nn.Module, Tensor]:
    """A net and an input of a seed; every other one as DCGAN initialises it."""
    make, shape = GANS[name]
    torch.manual_seed(seed)
    net = make()
    if seed % 2:
        net.apply(weights_init)
    return net, torch.randn(shape)
