"""Encoder and decoder of VQGAN, in the manner of taming-transformers."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


def norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(num_groups=32, num_channels=channels, eps=1e-6, affine=True)


class ResnetBlock(nn.Module):
    """Maps [N, in, H, W] -> [N, out, H, W]; a time embedding [N, T] is optional."""

    def __init__(
        self,
        inputs: int,
        outputs: int | None = None,
        conv_shortcut: bool = False,
        dropout: float = 0.0,
        temb_channels: int = 0,
    ) -> None:
        super().__init__()
        outputs = inputs if outputs is None else outputs
        self.inputs, self.outputs, self.use_conv_shortcut = inputs, outputs, conv_shortcut
        self.norm1, self.conv1 = norm(inputs), nn.Conv2d(inputs, outputs, kernel_size=3, stride=1, padding=1)
        if temb_channels > 0:
            self.temb_proj = nn.Linear(temb_channels, outputs)
        self.norm2, self.dropout = norm(outputs), nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(outputs, outputs, kernel_size=3, stride=1, padding=1)
        if self.inputs != self.outputs:
            if conv_shortcut:
                self.conv_shortcut = nn.Conv2d(inputs, outputs, kernel_size=3, stride=1, padding=1)
            else:
                self.nin_shortcut = nn.Conv2d(inputs, outputs, kernel_size=1, stride=1, padding=0)

    def forward(self, x: Tensor, temb: Tensor | None) -> Tensor:
        h = swish(self.norm1(x))
        h = self.conv1(h)
        if temb is not None:
            h = h + self.temb_proj(swish(temb))[:, :, None, None]
        h = swish(self.norm2(h))
        h = self.conv2(self.dropout(h))
        if self.inputs != self.outputs:
            x = self.conv_shortcut(x) if self.use_conv_shortcut else self.nin_shortcut(x)
        return x + h


class AttnBlock(nn.Module):
    """Maps [N, C, H, W] -> [N, C, H, W], each attending to itself with one head."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = norm(channels)
        self.q, self.k, self.v, self.proj_out = (nn.Conv2d(channels, channels, 1) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        h_ = self.norm(x)
        q, k, v = self.q(h_), self.k(h_), self.v(h_)
        b, c, h, w = q.shape
        q = q.reshape(b, c, h * w).permute(0, 2, 1)
        k = k.reshape(b, c, h * w)
        weights = torch.bmm(q, k) * (int(c) ** (-0.5))
        weights = F.softmax(weights, dim=2).permute(0, 2, 1)
        h_ = torch.bmm(v.reshape(b, c, h * w), weights).reshape(b, c, h, w)
        return x + self.proj_out(h_)


class Upsample(nn.Module):
    """Maps [N, C, H, W] -> [N, C, 2H, 2W]."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.interpolate(x, scale_factor=2.0, mode="nearest")
        if self.with_conv:
            x = self.conv(x)
        return x


class Downsample(nn.Module):
    """Maps [N, C, H, W] -> [N, C, H/2, W/2]; zeros come at the right and below only."""

    def __init__(self, channels: int, with_conv: bool = True) -> None:
        super().__init__()
        self.with_conv = with_conv
        if with_conv:
            self.conv = nn.Conv2d(channels, channels, kernel_size=3, stride=2, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        if self.with_conv:
            x = F.pad(x, (0, 1, 0, 1), mode="constant", value=0)
            return self.conv(x)
        return F.avg_pool2d(x, kernel_size=2, stride=2)


def _middle(channels: int, dropout: float) -> Any:
    mid: Any = nn.Module()
    mid.block_1 = ResnetBlock(channels, dropout=dropout)
    mid.attn_1 = AttnBlock(channels)
    mid.block_2 = ResnetBlock(channels, dropout=dropout)
    return mid


def _level(widths: Sequence[int], attend: bool, conv_shortcut: bool, dropout: float) -> Any:
    """Blocks from width to width; what resizes is added by the caller."""
    level: Any = nn.Module()
    level.block, level.attn = nn.ModuleList(), nn.ModuleList()
    for inputs, outputs in pairwise(widths):
        level.block.append(ResnetBlock(inputs, outputs, conv_shortcut, dropout))
        if attend:
            level.attn.append(AttnBlock(outputs))
    return level


class Encoder(nn.Module):
    """Images [N, 3, R, R] -> codes [N, Z, R/2^L, R/2^L], with L one less than the levels of `mult`."""

    def __init__(
        self,
        ch: int = 32,
        mult: Sequence[int] = (1, 1, 2),
        blocks: int = 1,
        resolution: int = 32,
        attn_resolutions: Sequence[int] = (16,),
        z_channels: int = 8,
        double_z: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_resolutions, self.num_res_blocks, self.resolution, self.temb_ch = len(mult), blocks, resolution, 0
        self.conv_in = nn.Conv2d(3, ch, kernel_size=3, stride=1, padding=1)
        here = resolution
        self.down: Any = nn.ModuleList()
        for i_level, (before, now) in enumerate(zip((1, *mult), mult, strict=False)):
            level = _level([ch * before, *[ch * now] * blocks], here in attn_resolutions, False, dropout)
            if i_level != self.num_resolutions - 1:
                level.downsample = Downsample(ch * now)
                here = here // 2
            self.down.append(level)
        self.mid = _middle(ch * mult[-1], dropout)
        self.norm_out = norm(ch * mult[-1])
        self.conv_out = nn.Conv2d(ch * mult[-1], 2 * z_channels if double_z else z_channels, 3, stride=1, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[2] == x.shape[3] == self.resolution, f"{x.shape[2]}, {x.shape[3]}, {self.resolution}"
        temb = None
        hs = [self.conv_in(x)]
        for i_level in range(self.num_resolutions):
            for i_block in range(self.num_res_blocks):
                h = self.down[i_level].block[i_block](hs[-1], temb)
                if len(self.down[i_level].attn) > 0:
                    h = self.down[i_level].attn[i_block](h)
                hs.append(h)
            if i_level != self.num_resolutions - 1:
                hs.append(self.down[i_level].downsample(hs[-1]))
        h = hs[-1]
        h = self.mid.block_1(h, temb)
        h = self.mid.attn_1(h)
        h = self.mid.block_2(h, temb)
        h = swish(self.norm_out(h))
        return self.conv_out(h)


class Decoder(nn.Module):
    """Codes [N, Z, R/2^L, R/2^L] -> images [N, 3, R, R]; the last shape seen is kept."""

    def __init__(
        self,
        ch: int = 32,
        mult: Sequence[int] = (1, 1, 2),
        blocks: int = 1,
        resolution: int = 32,
        attn_resolutions: Sequence[int] = (16,),
        z_channels: int = 8,
        give_pre_end: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_resolutions, self.num_res_blocks, self.give_pre_end = len(mult), blocks, give_pre_end
        here, block_in = resolution // 2 ** (len(mult) - 1), ch * mult[-1]
        self.z_shape = (1, z_channels, here, here)
        self.conv_in = nn.Conv2d(z_channels, block_in, kernel_size=3, stride=1, padding=1)
        self.mid = _middle(block_in, dropout)
        self.up: Any = nn.ModuleList()
        for i_level in reversed(range(self.num_resolutions)):
            block_out = ch * mult[i_level]
            level = _level([block_in, *[block_out] * (blocks + 1)], here in attn_resolutions, True, dropout)
            block_in = block_out
            if i_level != 0:
                level.upsample = Upsample(block_in)
                here = here * 2
            self.up.insert(0, level)
        self.norm_out = norm(block_in)
        self.conv_out = nn.Conv2d(block_in, 3, kernel_size=3, stride=1, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        self.last_z_shape = z.shape
        temb = None
        h = self.conv_in(z)
        h = self.mid.block_1(h, temb)
        h = self.mid.attn_1(h)
        h = self.mid.block_2(h, temb)
        for i_level in reversed(range(self.num_resolutions)):
            for i_block in range(self.num_res_blocks + 1):
                h = self.up[i_level].block[i_block](h, temb)
                if len(self.up[i_level].attn) > 0:
                    h = self.up[i_level].attn[i_block](h)
            if i_level != 0:
                h = self.up[i_level].upsample(h)
        if self.give_pre_end:
            return h
        h = swish(self.norm_out(h))
        return self.conv_out(h)
