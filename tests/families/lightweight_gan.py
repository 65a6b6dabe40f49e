"""Lightweight GAN: a generator with skip-layer excitation, and a discriminator with a decoder for one more loss."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn


def exists(value: object) -> bool:
    return value is not None


def _leaky() -> nn.Module:
    return nn.LeakyReLU(0.1)


class PixelShuffleUpsample(nn.Module):
    """Maps [N, C, H, W] -> [N, C, 2H, 2W]; the four pixels of one start equal."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        conv = nn.Conv2d(dim, dim * 4, 1)
        self.net = nn.Sequential(conv, nn.SiLU(), nn.PixelShuffle(2))
        with torch.no_grad():
            conv.weight.copy_(conv.weight[:dim].repeat_interleave(4, 0))
        nn.init.zeros_(conv.bias.data)  # pyright: ignore[reportOptionalMemberAccess]

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def upsample(dim: int, shuffle: bool = False) -> nn.Module:
    return PixelShuffleUpsample(dim) if shuffle else nn.Upsample(scale_factor=2, mode="nearest")


class Noise(nn.Module):
    """Maps [N, C, H, W] + w * noise, where the noise [N, 1, H, W] may be given."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor, noise: Tensor | None = None) -> Tensor:
        b, _, h, w = x.shape
        if not exists(noise):
            noise = torch.randn(b, 1, h, w, device=x.device)
        assert noise is not None
        return x + self.weight * noise


class ChanNorm(nn.Module):
    """A LayerNorm over channels of [N, C, H, W]."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.g, self.b = nn.Parameter(torch.ones(1, dim, 1, 1)), nn.Parameter(torch.zeros(1, dim, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        std = torch.var(x, dim=1, unbiased=False, keepdim=True).sqrt()
        mean = torch.mean(x, dim=1, keepdim=True)
        return (x - mean) / (std + self.eps) * self.g + self.b


class PreNorm(nn.Module):
    """A part behind a norm of its own."""

    def __init__(self, dim: int, fn: nn.Module) -> None:
        super().__init__()
        self.fn, self.norm = fn, ChanNorm(dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fn(self.norm(x))


class LinearAttention(nn.Module):
    """Maps [N, C, H, W] -> [N, C, H, W] at a cost linear in H * W."""

    def __init__(self, dim: int, dim_head: int = 16, heads: int = 2) -> None:
        super().__init__()
        inner = dim_head * heads
        self.scale, self.heads, self.nonlin = dim_head**-0.5, heads, nn.GELU()
        self.to_q = nn.Conv2d(dim, inner, 1, bias=False)
        depthwise = nn.Conv2d(dim, dim, 3, padding=1, groups=dim, bias=False)
        self.to_kv = nn.Sequential(depthwise, nn.Conv2d(dim, inner * 2, 1, bias=False))
        self.to_out = nn.Conv2d(inner, dim, 1)

    def forward(self, fmap: Tensor) -> Tensor:
        h, (b, _, x, y) = self.heads, fmap.shape
        q, k, v = (self.to_q(fmap), *self.to_kv(fmap).chunk(2, dim=1))
        q, k, v = (t.reshape(b * h, -1, x * y).transpose(1, 2) for t in (q, k, v))
        q, k = q.softmax(dim=-1), k.softmax(dim=-2)
        q = q * self.scale
        context = einsum("b n d, b n e -> b d e", k, v)
        out = einsum("b n d, b d e -> b n e", q, context)
        out = out.transpose(1, 2).reshape(b, -1, x, y)
        return self.to_out(self.nonlin(out))


class GlobalContext(nn.Module):
    """A skip-layer excitation: [N, in, H, W] -> factors [N, out, 1, 1]."""

    def __init__(self, *, chan_in: int, chan_out: int) -> None:
        super().__init__()
        inner = max(3, chan_out // 2)
        self.to_k = nn.Conv2d(chan_in, 1, 1)
        self.net = nn.Sequential(nn.Conv2d(chan_in, inner, 1), nn.SiLU(), nn.Conv2d(inner, chan_out, 1), nn.Sigmoid())

    def forward(self, x: Tensor) -> Tensor:
        context = self.to_k(x).flatten(2).softmax(dim=-1)
        out = einsum("b i n, b c n -> b c i", context, x.flatten(2))
        return self.net(out.unsqueeze(-1))


class Generator(nn.Module):
    """Latents [N, Z] -> images [N, 3, S, S]; a map at one resolution excites that at `sle_map` of it."""

    def __init__(
        self,
        image_size: int = 32,
        latent_dim: int = 16,
        fmap_max: int = 32,
        fmap_inverse_coef: int = 7,
        attn_res_layers: Sequence[int] = (16,),
        sle_map: Sequence[tuple[int, int]] = ((2, 4), (3, 5)),
        shuffle: bool = False,
    ) -> None:
        super().__init__()
        resolution = math.log2(image_size)
        assert resolution.is_integer(), "image size must be a power of 2"
        num_layers = int(resolution) - 2
        self.initial_conv = nn.Sequential(
            nn.ConvTranspose2d(latent_dim, latent_dim * 2, 4), nn.BatchNorm2d(latent_dim * 2), nn.GLU(dim=1)
        )
        self.res_layers = range(2, num_layers + 2)
        features = [latent_dim, *(min(2 ** (fmap_inverse_coef - n), fmap_max) for n in self.res_layers)]
        self.res_to_feature_map = dict(zip(self.res_layers, pairwise(features), strict=True))
        self.sle_map = dict(filter(lambda t: t[0] <= resolution and t[1] <= resolution, sle_map))
        self.layers: Any = nn.ModuleList([])
        for res, (chan_in, chan_out) in self.res_to_feature_map.items():
            attn = PreNorm(chan_in, LinearAttention(chan_in)) if 2**res in attn_res_layers else None
            sle = None
            if res in self.sle_map:
                residual_layer = self.sle_map[res]
                sle = GlobalContext(chan_in=chan_out, chan_out=self.res_to_feature_map[residual_layer - 1][-1])
            up = nn.Sequential(
                upsample(chan_in, shuffle),
                nn.Identity(),
                nn.Conv2d(chan_in, chan_out * 2, 3, padding=1),
                Noise(),
                nn.BatchNorm2d(chan_out * 2),
                nn.GLU(dim=1),
            )
            self.layers.append(nn.ModuleList([up, sle, attn]))  # pyright: ignore[reportArgumentType]
        self.out_conv = nn.Conv2d(features[-1], 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, :, None, None]
        x = self.initial_conv(x)
        x = F.normalize(x, dim=1)
        residuals: dict[int, Tensor] = {}
        for res, (up, sle, attn) in zip(self.res_layers, self.layers, strict=True):
            if exists(attn):
                x = attn(x) + x
            x = up(x)
            if exists(sle):
                residuals[self.sle_map[res]] = sle(x)
            next_res = res + 1
            if next_res in residuals:
                x = x * residuals[next_res]
        return self.out_conv(x)


class SimpleDecoder(nn.Module):
    """Features [N, C, H, W] -> images [N, 3, H * 2^U, W * 2^U]."""

    def __init__(self, *, chan_in: int, num_upsamples: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList([])
        chans = chan_in
        for ind in range(num_upsamples):
            chan_out = chans if ind < num_upsamples - 1 else 3 * 2
            conv = nn.Conv2d(chans, chan_out, 3, padding=1)
            self.layers.append(nn.Sequential(upsample(chans), conv, nn.GLU(dim=1)))
            chans //= 2

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


class SumBranches(nn.Module):
    """The sum of what parts make of the same map."""

    def __init__(self, branches: Sequence[nn.Module]) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        return sum(map(lambda fn: fn(x), self.branches))  # pyright: ignore[reportReturnType]  # noqa: C417


def _down(chan_in: int, chan_out: int) -> nn.Module:
    strided = nn.Sequential(
        nn.Identity(),
        nn.Conv2d(chan_in, chan_out, 4, stride=2, padding=1),
        _leaky(),
        nn.Conv2d(chan_out, chan_out, 3, padding=1),
        _leaky(),
    )
    pooled = nn.Sequential(nn.Identity(), nn.AvgPool2d(2), nn.Conv2d(chan_in, chan_out, 1), _leaky())
    return SumBranches([strided, pooled])


class Discriminator(nn.Module):
    """Images [N, 3, S, S] -> logits [N, 25], their logits at 32 px, and the auxiliary loss if asked for."""

    def __init__(self, image_size: int = 64, width: int = 8, attn_res_layers: Sequence[int] = (16,)) -> None:
        super().__init__()
        self.non_residual_layers = nn.ModuleList(
            [nn.Sequential(nn.Identity(), nn.Conv2d(3, width, 4, stride=2, padding=1), _leaky())]
        )
        self.residual_layers: Any = nn.ModuleList([])
        size, chans = image_size // 2, width
        while size > 8:
            attn = PreNorm(chans, LinearAttention(chans)) if size in attn_res_layers else None
            self.residual_layers.append(nn.ModuleList([_down(chans, chans * 2), attn]))  # pyright: ignore[reportArgumentType]
            size, chans = size // 2, chans * 2
        self.to_logits = nn.Sequential(nn.Conv2d(chans, chans, 1), _leaky(), nn.Conv2d(chans, 1, 4))
        self.to_shape_disc_out = nn.Sequential(
            nn.Conv2d(3, width, 3, padding=1), _down(width, width), nn.AdaptiveAvgPool2d((4, 4)), nn.Conv2d(width, 1, 4)
        )
        upsamples = int(math.log2(image_size // size))
        self.decoder = SimpleDecoder(chan_in=chans, num_upsamples=upsamples)

    def forward(self, x: Tensor, calc_aux_loss: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        orig_img = x
        for layer in self.non_residual_layers:
            x = layer(x)
        layer_outputs: list[Tensor] = []
        for net, attn in self.residual_layers:
            if exists(attn):
                x = attn(x) + x
            x = net(x)
            layer_outputs.append(x)
        out = self.to_logits(x).flatten(1)
        img_32x32 = F.interpolate(orig_img, size=(32, 32))
        out_32x32 = self.to_shape_disc_out(img_32x32)
        if not calc_aux_loss:
            return out, out_32x32, None
        recon_img = self.decoder(layer_outputs[-1])
        aux_loss = F.mse_loss(recon_img, F.interpolate(orig_img, size=recon_img.shape[2:]))
        return out, out_32x32, aux_loss
