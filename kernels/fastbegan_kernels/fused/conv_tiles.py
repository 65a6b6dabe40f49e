"""Tile sizes of the matrix-product kernels, and the choice of those that suit a layer."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .conv import Product

HALF_TYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Tile:
    """A tile of a pointer kernel: pixels, output channels, input channels, warps and pipeline stages.

    `flat`: programs are numbered with the four phases of a transposed convolution first, then output channels, then
    pixels. So programs that run together read the same pixels. Else phases come last.
    """

    block_m: int
    block_k: int
    block_c: int
    warps: int
    stages: int
    flat: bool = False

    @property
    def name(self) -> str:
        blocks = f"{self.block_m}x{self.block_k}x{self.block_c} w{self.warps} s{self.stages}"
        return f"pointer {blocks}{' flat' if self.flat else ''}"


@dataclass(frozen=True)
class TmaTile:
    """A tile of a descriptor kernel: samples, height and width of a block of output pixels; the rest as `Tile`."""

    samples: int
    height: int
    width: int
    block_k: int
    block_c: int
    warps: int
    stages: int
    flat: bool = False

    @property
    def pixels(self) -> int:
        return self.samples * self.height * self.width

    @property
    def name(self) -> str:
        pixels = f"{self.samples}x{self.height}x{self.width}"
        blocks = f"{pixels}x{self.block_k}x{self.block_c} w{self.warps} s{self.stages}"
        return f"tma {blocks}{' flat' if self.flat else ''}"


AnyTile = Tile | TmaTile


# tests/kernels/test_cross_compile.py holds these tiles to ceilings of registers and shared memory. The widest come
# first. None was timed on a GPU yet.
AMPERE = (Tile(128, 128, 32, 4, 3), Tile(256, 128, 32, 8, 3))
"""For sm_80 to sm_89: two programs an SM, or a quarter less to read. Each spills in some products (`suits`)."""
HALF = (
    Tile(128, 128, 64, 8, 3),
    Tile(128, 64, 64, 4, 3),
    Tile(64, 64, 64, 4, 3),
    Tile(64, 32, 32, 4, 3),
    Tile(64, 16, 64, 4, 3),
    Tile(64, 16, 32, 4, 3),
    Tile(64, 16, 16, 4, 3),
)
FULL = (Tile(64, 64, 32, 8, 3), Tile(64, 32, 32, 4, 3), Tile(64, 16, 16, 4, 2))
TMA = (
    TmaTile(1, 16, 16, 128, 64, 8, 3),
    TmaTile(1, 8, 16, 128, 64, 8, 3),
    TmaTile(2, 8, 8, 128, 64, 8, 3),
    TmaTile(1, 16, 16, 64, 64, 4, 4),
    TmaTile(1, 8, 16, 64, 64, 4, 4),
    TmaTile(2, 8, 8, 64, 64, 4, 4),
)
_FEW_PIXELS = 8192  # under this many a 128-pixel tile leaves most of the chip idle


def pointer_tiles(dtype: torch.dtype, capability: int) -> tuple[Tile, ...]:
    """The pointer kernels' tiles for an architecture (80, 90, 100, ...), the widest first."""
    if dtype not in HALF_TYPES:
        return FULL
    if capability < 90:
        return AMPERE + HALF
    # the widest spills in up-convolutions on sm_100 (Triton 3.9), and the next in forwards on sm_120
    return HALF if capability < 100 else HALF[1:] if capability < 120 else HALF[2:]


def tma_tiles(dtype: torch.dtype, capability: int) -> tuple[TmaTile, ...]:
    """The descriptor kernels' tiles for an architecture: none before Hopper, half precision only."""
    if capability < 90 or dtype not in HALF_TYPES:
        return ()
    return TMA if capability < 100 else tuple(tile for tile in TMA if tile.pixels < 256)  # those spill on sm_100


def suits(product: Product, tile: Tile, capability: int) -> bool:
    """Whether a pointer kernel with this tile keeps its values in registers (Triton 3.9).

    Tiles of AMPERE have none to spare: not for channels left over, nor for the phase table or the input gradient of
    stride 2, and the wider one not in any backward.
    """
    if replace(tile, flat=False) not in AMPERE:
        spills = capability >= 100 and (tile.block_m, tile.block_k) == (64, 64) and tile.block_c == 64
        return not (spills and product.transpose and product.backward)
    whole = product.channels % tile.block_c == 0
    if tile.block_m == 256:
        return whole and not (product.transpose or product.backward)
    return whole and not product.has_skip and not (product.transpose and product.backward)


def pick_tile(product: Product, dtype: torch.dtype, capability: int) -> Tile:
    """The pointer tile to use unmeasured: no wider than the channels, and small where pixels are few.

    Channels that are no multiple of 8 are loaded one by one, for which only the last tile has the registers.
    """
    table = pointer_tiles(dtype, capability)
    if not product.aligned:
        return table[-1]
    fitting = [
        tile
        for tile in table
        if tile.block_k < 2 * product.out_channels
        and tile.block_c < 2 * product.channels
        and suits(product, tile, capability)
    ]
    if product.rows < _FEW_PIXELS:
        fitting = [tile for tile in fitting if tile.block_m <= 64] or fitting
    return fitting[0] if fitting else table[-1]


def fits(product: Product, tile: TmaTile) -> bool:
    """Whether a descriptor kernel can compute a product without wasting most of a tile.

    Rows must be multiples of 16 bytes. With stride 2 a view joins two pixels: sizes must be even and blocks whole.
    """
    height, width = (product.in_h, product.in_w) if product.transpose else (product.out_h, product.out_w)
    if not product.aligned or tile.block_k > max(64, product.out_channels):
        return False
    if tile.height > max(8, height) or tile.width > max(8, width) or (tile.samples > 1 and height * width > 256):
        return False
    if product.transpose:
        whole = product.out_channels % tile.block_k == 0
        return whole and product.out_h == 2 * height and product.out_w == 2 * width
    return product.stride == 1 or (product.in_h % 2 == 0 == product.in_w % 2 and product.channels % tile.block_c == 0)


def tiles_for(product: Product, dtype: torch.dtype, capability: int, *, descriptors: bool) -> list[AnyTile]:
    """The tiles to measure for a product, as wide as the first or half as wide. Unmeasured, the first is used.

    Each costs every new user a compilation, a trial and a measurement.
    """
    first = pick_tile(product, dtype, capability)
    if not product.aligned:
        return [first]
    near = [
        tile
        for tile in pointer_tiles(dtype, capability)
        if tile != first
        and tile.block_k in (first.block_k, first.block_k // 2)
        and (tile.block_m <= first.block_m or tile in AMPERE)
        and tile.block_c < 2 * product.channels
        and suits(product, tile, capability)
    ]
    tiles: list[AnyTile] = [first, *near]
    by_descriptors = [tile for tile in tma_tiles(dtype, capability) if descriptors and fits(product, tile)]
    flat = [replace((by_descriptors or tiles)[0], flat=True)] if product.transpose else []
    return [*tiles, *by_descriptors, *flat]


def tile_named(name: str) -> AnyTile:
    """The shipped tile of this name. Raises ValueError for another name."""
    for tile in (*AMPERE, *HALF, *FULL, *TMA):
        for shipped in (tile, replace(tile, flat=True)):
            if shipped.name == name:
                return shipped
    raise ValueError(f"tile is {name!r}; accepted: the names of shipped tiles")
