"""Tile sizes of the matrix-product kernels."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tile:
    """Pixels, output channels and input channels a program takes at once, its warps and its pipeline's depth."""

    block_m: int
    block_k: int
    block_c: int
    warps: int
    stages: int


# what the cross-compile gate holds to its ceilings (tests/kernels/test_cross_compile.py); none was timed on a GPU yet
HALF = (Tile(128, 128, 64, 8, 3), Tile(128, 64, 64, 4, 3), Tile(64, 64, 64, 4, 3), Tile(64, 16, 32, 4, 3))
FULL = (Tile(64, 64, 32, 4, 3), Tile(64, 32, 32, 4, 3), Tile(64, 16, 16, 4, 2))
_FEW_PIXELS = 8192  # under this many a 128-pixel tile leaves most of the chip idle


def shipped_tiles(dtype: torch.dtype, capability: int) -> tuple[Tile, ...]:
    """The tiles that the cross-compile gate passed for an architecture (80, 90, 100, ...), the widest first."""
    if dtype not in (torch.bfloat16, torch.float16):
        return FULL
    return HALF if capability < 100 else HALF[1:]  # the widest spills in up-convolutions on sm_100 (Triton 3.9)


def pick_tile(dtype: torch.dtype, pixels: int, channels: int, out_channels: int, capability: int) -> Tile:
    """The tile for an op: no wider than the channels there are, and small where there are few pixels."""
    table = shipped_tiles(dtype, capability)
    fitting = [tile for tile in table if tile.block_k < 2 * out_channels and tile.block_c < 2 * max(channels, 9)]
    if pixels < _FEW_PIXELS:
        fitting = [tile for tile in fitting if tile.block_m <= 64] or fitting
    return fitting[0] if fitting else table[-1]
