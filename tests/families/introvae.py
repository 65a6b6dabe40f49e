"""IntroVAE: a residual VAE whose every upsampled map goes into a convolution and into the skip beside it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class ResidualBlock(nn.Module):
    """Maps [N, in, H, W] -> [N, out, H, W], with BatchNorm and an activation after the sum."""

    def __init__(self, inc: int, outc: int, groups: int = 1, scale: float = 1.0) -> None:
        super().__init__()
        midc = int(outc * scale)
        self.conv_expand = nn.Conv2d(inc, outc, 1, 1, 0, groups=1, bias=False) if inc != outc else None
        self.conv1 = nn.Conv2d(inc, midc, 3, 1, 1, groups=groups, bias=False)
        self.bn1, self.relu1 = nn.BatchNorm2d(midc), nn.LeakyReLU(0.2, inplace=True)
        self.conv2 = nn.Conv2d(midc, outc, 3, 1, 1, groups=groups, bias=False)
        self.bn2, self.relu2 = nn.BatchNorm2d(outc), nn.LeakyReLU(0.2, inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        identity = self.conv_expand(x) if self.conv_expand is not None else x
        out = self.relu1(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        return self.relu2(torch.add(out, identity))


class Encoder(nn.Module):
    """Images [N, 3, S, S] -> means and logarithms of variances, each [N, H]."""

    def __init__(self, hdim: int, channels: Sequence[int], image_size: int) -> None:
        super().__init__()
        assert 2 ** len(channels) * 4 == image_size
        cc, sz = channels[0], image_size // 2
        self.main = nn.Sequential(
            nn.Conv2d(3, cc, 5, 1, 2, bias=False), nn.BatchNorm2d(cc), nn.LeakyReLU(0.2), nn.AvgPool2d(2)
        )
        for ch in channels[1:]:
            self.main.add_module(f"res_in_{sz}", ResidualBlock(cc, ch))
            self.main.add_module(f"down_to_{sz // 2}", nn.AvgPool2d(2))
            cc, sz = ch, sz // 2
        self.main.add_module(f"res_in_{sz}", ResidualBlock(cc, cc))
        self.fc = nn.Linear(cc * 4 * 4, 2 * hdim)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.main(x).view(x.size(0), -1)
        mu, logvar = self.fc(y).chunk(2, dim=1)
        return mu, logvar


class Decoder(nn.Module):
    """Latents [N, H] or [N, H, 1, 1], and conditions if any, -> images [N, 3, S, S]."""

    def __init__(self, hdim: int, channels: Sequence[int], image_size: int) -> None:
        super().__init__()
        cc, sz = channels[-1], 4
        self.image_size = image_size
        self.fc = nn.Sequential(nn.Linear(hdim, cc * 4 * 4), nn.ReLU(True))
        self.main = nn.Sequential()
        for ch in channels[::-1]:
            self.main.add_module(f"res_in_{sz}", ResidualBlock(cc, ch))
            self.main.add_module(f"up_to_{sz * 2}", nn.Upsample(scale_factor=2, mode="nearest"))
            cc, sz = ch, sz * 2
        self.main.add_module(f"res_in_{sz}", ResidualBlock(cc, cc))
        self.main.add_module("predict", nn.Conv2d(cc, 3, 5, 1, 2))

    def forward(self, z: Tensor, condition: Tensor | None = None) -> Tensor:
        if z.dim() > 2:
            z = z.view(z.size(0), -1)
        if condition is not None:
            z = torch.cat([z, condition.view(condition.size(0), -1)], dim=1)
        y = self.fc(z)
        y = y.view(z.size(0), -1, 4, 4)
        for layer in self.main:
            y = layer(y)
        if y.size(-1) != self.image_size:
            raise ValueError(f"expected images of {self.image_size} px, got {y.size(-1)}")
        return y


class IntroVAE(nn.Module):
    """Images [N, 3, S, S] -> means, logarithms of variances, latents and images."""

    def __init__(self, hdim: int = 16, channels: Sequence[int] = (16, 32, 32), image_size: int = 32) -> None:
        super().__init__()
        self.encoder = Encoder(hdim, channels, image_size)
        self.decoder = Decoder(hdim, channels, image_size)

    def reparameterize(self, mu: Tensor, logvar: Tensor) -> Tensor:
        std = logvar.mul(0.5).exp_()
        return torch.randn_like(std).mul(std).add_(mu)

    def forward(self, x: Tensor, deterministic: bool = False) -> tuple[Tensor, ...]:
        mu, logvar = self.encoder(x)
        z = mu if deterministic else self.reparameterize(mu, logvar)
        return mu, logvar, z, self.decoder(z)
