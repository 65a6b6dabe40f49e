"""VQ-VAE-2 with two levels, in the manner of rosinality's: residual blocks add in place, codebooks move in training."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Quantize(nn.Module):
    """Vectors [..., D] -> the nearest codes [..., D], their distance, and their indices [...]."""

    embed: Tensor
    cluster_size: Tensor
    embed_avg: Tensor

    def __init__(self, dim: int, n_embed: int, decay: float = 0.99, eps: float = 1e-5) -> None:
        super().__init__()
        self.dim, self.n_embed, self.decay, self.eps = dim, n_embed, decay, eps
        embed = torch.randn(dim, n_embed)
        self.register_buffer("embed", embed)
        self.register_buffer("cluster_size", torch.zeros(n_embed))
        self.register_buffer("embed_avg", embed.clone())

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        flatten = input.reshape(-1, self.dim)
        dist = flatten.pow(2).sum(1, keepdim=True) - 2 * flatten @ self.embed + self.embed.pow(2).sum(0, keepdim=True)
        _, index = (-dist).max(1)
        onehot = F.one_hot(index, self.n_embed).type(flatten.dtype)
        index = index.view(*input.shape[:-1])
        quantize = F.embedding(index, self.embed.transpose(0, 1))
        if self.training:
            self.cluster_size.data.mul_(self.decay).add_(onehot.sum(0), alpha=1 - self.decay)
            self.embed_avg.data.mul_(self.decay).add_((flatten.transpose(0, 1) @ onehot).detach(), alpha=1 - self.decay)
            n = self.cluster_size.sum()
            cluster_size = (self.cluster_size + self.eps) / (n + self.n_embed * self.eps) * n
            self.embed.data.copy_(self.embed_avg / cluster_size.unsqueeze(0))
        diff = (quantize.detach() - input).pow(2).mean()
        quantize = input + (quantize - input).detach()
        return quantize, diff, index


class ResBlock(nn.Module):
    """Maps [N, C, H, W] -> [N, C, H, W]."""

    def __init__(self, in_channel: int, channel: int) -> None:
        super().__init__()
        self.conv = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(in_channel, channel, 3, padding=1),
            nn.ReLU(inplace=True),
            nn.Conv2d(channel, in_channel, 1),
        )

    def forward(self, input: Tensor) -> Tensor:
        out = self.conv(input)
        out += input
        return out


def _residual(channel: int, count: int, hidden: int) -> list[nn.Module]:
    return [*(ResBlock(channel, hidden) for _ in range(count)), nn.ReLU(inplace=True)]


class Encoder(nn.Module):
    """Maps [N, in, H, W] -> [N, channel, H/stride, W/stride], for a stride of 4 or 2."""

    def __init__(self, in_channel: int, channel: int, n_res_block: int, n_res_channel: int, stride: int) -> None:
        super().__init__()
        half = channel // 2
        blocks = [nn.Conv2d(in_channel, half, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
        if stride == 4:
            blocks += [nn.Conv2d(half, channel, 4, stride=2, padding=1), nn.ReLU(inplace=True)]
            blocks += [nn.Conv2d(channel, channel, 3, padding=1)]
        elif stride == 2:
            blocks += [nn.Conv2d(half, channel, 3, padding=1)]
        self.blocks = nn.Sequential(*blocks, *_residual(channel, n_res_block, n_res_channel))

    def forward(self, input: Tensor) -> Tensor:
        return self.blocks(input)


def _doubled(inputs: int, outputs: int, nearest: bool) -> list[nn.Module]:
    if nearest:
        return [nn.Upsample(scale_factor=2, mode="nearest"), nn.Conv2d(inputs, outputs, 3, padding=1)]
    return [nn.ConvTranspose2d(inputs, outputs, 4, stride=2, padding=1)]


class Decoder(nn.Module):
    """Maps [N, in, H, W] -> [N, out, stride H, stride W], for a stride of 4 or 2."""

    def __init__(
        self, sizes: tuple[int, int, int], n_res_block: int, n_res_channel: int, stride: int, nearest: bool
    ) -> None:
        super().__init__()
        in_channel, channel, out_channel = sizes
        blocks = [nn.Conv2d(in_channel, channel, 3, padding=1), *_residual(channel, n_res_block, n_res_channel)]
        if stride == 4:
            blocks += [*_doubled(channel, channel // 2, nearest), nn.ReLU(inplace=True)]
            blocks += _doubled(channel // 2, out_channel, nearest)
        elif stride == 2:
            blocks += _doubled(channel, out_channel, nearest)
        self.blocks = nn.Sequential(*blocks)

    def forward(self, input: Tensor) -> Tensor:
        return self.blocks(input)


class VQVAE(nn.Module):
    """Images [N, 3, S, S] -> images [N, 3, S, S] and the distances to the codes [1]."""

    def __init__(
        self,
        channel: int = 32,
        n_res_block: int = 2,
        n_res_channel: int = 16,
        embed_dim: int = 16,
        n_embed: int = 64,
        nearest: bool = False,
    ) -> None:
        super().__init__()
        res = (n_res_block, n_res_channel)
        self.enc_b = Encoder(3, channel, *res, stride=4)
        self.enc_t = Encoder(channel, channel, *res, stride=2)
        self.quantize_conv_t = nn.Conv2d(channel, embed_dim, 1)
        self.quantize_t = Quantize(embed_dim, n_embed)
        self.dec_t = Decoder((embed_dim, channel, embed_dim), *res, stride=2, nearest=nearest)
        self.quantize_conv_b = nn.Conv2d(embed_dim + channel, embed_dim, 1)
        self.quantize_b = Quantize(embed_dim, n_embed)
        self.upsample_t = nn.Sequential(*_doubled(embed_dim, embed_dim, nearest))
        self.dec = Decoder((embed_dim + embed_dim, channel, 3), *res, stride=4, nearest=nearest)

    def forward(self, input: Tensor) -> tuple[Tensor, Tensor]:
        quant_t, quant_b, diff, _, _ = self.encode(input)
        dec = self.decode(quant_t, quant_b)
        return dec, diff

    def encode(self, input: Tensor) -> tuple[Tensor, ...]:
        enc_b = self.enc_b(input)
        enc_t = self.enc_t(enc_b)
        quant_t = self.quantize_conv_t(enc_t).permute(0, 2, 3, 1)
        quant_t, diff_t, id_t = self.quantize_t(quant_t)
        quant_t, diff_t = quant_t.permute(0, 3, 1, 2), diff_t.unsqueeze(0)
        enc_b = torch.cat([self.dec_t(quant_t), enc_b], 1)
        quant_b = self.quantize_conv_b(enc_b).permute(0, 2, 3, 1)
        quant_b, diff_b, id_b = self.quantize_b(quant_b)
        quant_b, diff_b = quant_b.permute(0, 3, 1, 2), diff_b.unsqueeze(0)
        return quant_t, quant_b, diff_t + diff_b, id_t, id_b

    def decode(self, quant_t: Tensor, quant_b: Tensor) -> Tensor:
        upsample_t = self.upsample_t(quant_t)
        quant = torch.cat([upsample_t, quant_b], 1)
        return self.dec(quant)
