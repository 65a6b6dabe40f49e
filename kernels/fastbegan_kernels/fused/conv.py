# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and does not know its launch options)
"""Launches the matrix-product kernels for a convolution layer and its input gradient.

Inputs are on one device and have one dtype; biases may be float32. Images and weights are copied to channels_last where
they are not. A layer's kind is "same" (stride 1), "down" (stride 2) or "up" (nearest x2 before a 3x3 kernel, given by
its folded weights [C, K, 4, 4]). Programs write their parts of a bias gradient as float32 partials, which are added in
a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from ..arguments import output_size
from ..dispatch import allows_tf32
from ..layout import lay_out
from . import conv_pointer, conv_tma
from .conv_tiles import AnyTile, Tile, TmaTile, tiles_for
from .memory import total
from .skip_phase_table import table_memory


@dataclass(frozen=True)
class Product:
    """The matrix product of a layer, or of its input gradient. Sizes are those of the kernel's input and output."""

    transpose: bool  # a transposed convolution of stride 2, in four phases
    turned: bool  # weights turned by 180 degrees; the sum runs over their first dimension
    stride: int
    kernel: int
    backward: bool
    has_skip: bool
    batch: int
    channels: int
    out_channels: int
    in_h: int
    in_w: int
    out_h: int
    out_w: int

    @property
    def padding(self) -> int:
        return self.kernel // 2 if self.kernel < 4 else 1

    @property
    def rows(self) -> int:
        """Pixels of the product; with four phases, those of one."""
        return self.batch * (self.in_h * self.in_w if self.transpose else self.out_h * self.out_w)

    @property
    def aligned(self) -> bool:
        """Whether rows of both factors are multiples of eight values, so that 16-byte copies can load them."""
        return self.channels % 8 == 0 == self.out_channels % 8

    def programs(self, tile: AnyTile) -> int:
        """The number of programs for the pixels."""
        if isinstance(tile, Tile):
            return -(-self.rows // tile.block_m)
        height, width = (self.in_h, self.in_w) if self.transpose else (self.out_h, self.out_w)
        return -(-self.batch // tile.samples) * -(-height // tile.height) * -(-width // tile.width)


_Call = tuple[Any, tuple[Any, ...], dict[str, Any]]  # a kernel, its arguments and compile-time settings


class _Launch(NamedTuple):
    """A kernel with its grid, arguments and compile-time settings, and the memory that it writes."""

    kernel: Any
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]
    settings: dict[str, Any]
    out: Tensor
    partial: Tensor | None  # sums over the pixels of each program


class _Epilogue(NamedTuple):
    """The work after a matrix product: bias, skip and activation, or with y_prev an activation's derivative."""

    bias: Tensor | None
    skip: Tensor | None  # [N, S, S, 3, 3, K]
    y_prev: Tensor | None
    activation: str
    alpha: float  # a float: an integer would be another binary


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    *,
    kind: str,
    activation: str,
    alpha: float,
    tile: AnyTile,
) -> Tensor:
    """act(conv(x) + bias + skip): x [N, C, H, W] -> [N, K, H', W'], channels_last.

    weight is [K, C, k, k] (k 1 or 3, "same" padding), for kind "up" the folded [C, K, 4, 4]; `skip` is the phase table
    [N, 3, 3, S, S, K], for kind "up" only.
    """
    product = product_of(tuple(x.shape), tuple(weight.shape), kind, False, skip is not None)
    # float32, so that one binary serves every dtype of bias
    bias = None if bias is None else bias.float().contiguous()
    skip = None if skip is None else table_memory(skip)
    launch = _prepare(product, x, weight, _Epilogue(bias, skip, None, activation, float(alpha)), tile)
    if launch.out.numel():
        with torch.cuda.device_of(x):  # Triton launches on the current device
            launch.kernel[launch.grid](*launch.arguments, **launch.settings)
    return launch.out


def input_gradient(
    dz: Tensor,
    weight: Tensor,
    y_prev: Tensor | None = None,
    *,
    kind: str,
    size: tuple[int, int],
    activation: str = "none",
    alpha: float = 1.0,
    tile: AnyTile,
) -> tuple[Tensor, Tensor | None]:
    """The gradient dx at a layer's input [N, C, *size] from dz; stride 2 needs a 3x3 kernel.

    With y_prev, the output of the activation before the layer: dx * act'(y_prev), and its sum over pixels [C], float32.
    """
    product = product_of((len(dz), 0, *size), tuple(weight.shape), kind, True)
    y_prev = None if y_prev is None else _aligned(lay_out(y_prev, True))
    epilogue = _Epilogue(None, None, y_prev, "none" if y_prev is None else activation, float(alpha))
    launch = _prepare(product, dz, weight, epilogue, tile)
    if launch.out.numel():
        with torch.cuda.device_of(dz):
            launch.kernel[launch.grid](*launch.arguments, **launch.settings)
    return launch.out, None if launch.partial is None else total(launch.partial, 0)


@functools.lru_cache(maxsize=1024)
def product_of(
    x: tuple[int, ...], weight: tuple[int, ...], kind: str, backward: bool, has_skip: bool = False
) -> Product:
    """The matrix product of a layer, or of its input gradient, from the shapes of its input and packed weight."""
    batch, _, *size = x
    out_size = output_size(size, kind)
    transpose = kind == ("down" if backward else "up")
    first = transpose or (backward and kind == "same")  # sums run over the weight's first dimension
    channels, out_channels = weight[:2] if first else weight[1::-1]
    in_h, in_w, out_h, out_w = (*out_size, *size) if backward else (*size, *out_size)
    return Product(
        transpose=transpose,
        turned=first and not transpose,
        stride=1 if transpose or kind == "same" else 2,
        kernel=weight[2],
        backward=backward,
        has_skip=has_skip,
        batch=batch,
        channels=channels,
        out_channels=out_channels,
        in_h=in_h,
        in_w=in_w,
        out_h=out_h,
        out_w=out_w,
    )


def layer_tiles(product: Product, dtype: torch.dtype, device: torch.device) -> list[AnyTile]:
    """The tiles to measure for a product. Unmeasured, the first is used."""
    descriptors = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    return tiles_for(product, dtype, capability_of(device), descriptors=descriptors)


def capability_of(device: torch.device) -> int:
    """80 for sm_80 and so on. The interpreter stands for sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def _prepare(product: Product, x: Tensor, weight: Tensor, epilogue: _Epilogue, tile: AnyTile) -> _Launch:
    """The launch of one matrix product with its epilogue. Partial sums are there where there is y_prev."""
    x, weight = _aligned(lay_out(x, True)), _aligned(lay_out(weight.to(x.dtype), True))
    shape = (product.batch, product.out_channels, product.out_h, product.out_w)
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    pixel_tiles, phases = product.programs(tile), 4 if product.transpose else 1
    grid = (pixel_tiles, triton.cdiv(product.out_channels, tile.block_k), phases)
    partial = None
    if epilogue.y_prev is not None:
        partial = torch.empty((pixel_tiles * phases, product.out_channels), dtype=torch.float32, device=x.device)
    if tile.flat:
        grid = (grid[0] * grid[1] * grid[2], 1, 1)
    if isinstance(tile, TmaTile):
        kernel, arguments, settings = _tma(product, x, weight, epilogue, out, partial, tile)
    else:
        kernel, arguments, settings = _pointer(product, x, weight, epilogue, out, partial, tile)
    return _Launch(kernel, grid, arguments, settings, out, partial)


def _settings(product: Product, epilogue: _Epilogue, tile: AnyTile) -> dict[str, Any]:
    """The compile-time settings that both kinds of kernels have."""
    settings: dict[str, Any] = {
        "KERNEL": product.kernel,
        "HAS_BIAS": epilogue.bias is not None,
        "ACTIVATION": epilogue.activation,
        "BACKWARD": epilogue.y_prev is not None,
        "BLOCK_K": tile.block_k,
        "BLOCK_C": tile.block_c,
        "STAGES": tile.stages,
        "num_stages": tile.stages,
        "num_warps": tile.warps,
    }
    if product.transpose:
        return settings | {"SKIP_SIZE": 0 if epilogue.skip is None else epilogue.skip.shape[1], "FLAT": tile.flat}
    return settings | {"STRIDE": product.stride, "PAD": product.padding, "TURNED": product.turned}


def _pointer(
    product: Product,
    x: Tensor,
    weight: Tensor,
    epilogue: _Epilogue,
    out: Tensor,
    partial: Tensor | None,
    tile: Tile,
) -> _Call:
    bias, skip, y_prev, _, alpha = epilogue
    maps = (product.rows, product.in_h, product.in_w, product.out_h, product.out_w)
    sizes = (*maps, product.channels, product.out_channels, triton.cdiv(product.channels, tile.block_c), alpha)
    settings = _settings(product, epilogue, tile)
    settings |= {"FULL_C": product.channels % tile.block_c == 0, "ALIGNED": product.aligned, "BLOCK_M": tile.block_m}
    settings |= {"PRECISION": "tf32" if x.dtype == torch.float32 and allows_tf32() else "ieee"}
    if product.transpose:
        return conv_pointer._conv_transpose_kernel, (x, weight, bias, skip, y_prev, out, partial, *sizes), settings
    return conv_pointer._conv_kernel, (x, weight, bias, y_prev, out, partial, *sizes), settings


def _tma(
    product: Product,
    x: Tensor,
    weight: Tensor,
    epilogue: _Epilogue,
    out: Tensor,
    partial: Tensor | None,
    tile: TmaTile,
) -> _Call:
    def image(t: Tensor, channels: int, height: int, width: int, block_c: int, halves: bool) -> Any:
        batch, area = t.shape[0], (tile.height, tile.width)
        if not halves:
            return _descriptor(t, (batch, height, width, channels), (tile.samples, *area, block_c))
        # stride 2 as parity: [N, H / 2, 2, W / 2, 2 C], of which a block has one row parity (see conv_tma)
        shape = (batch, height // 2, 2, width // 2, 2 * channels)
        return _descriptor(t, shape, (tile.samples, area[0], 1, area[1], block_c))

    bias, skip, y_prev, _, alpha = epilogue
    first = product.transpose or product.turned
    rows, columns = (product.channels, product.out_channels) if first else (product.out_channels, product.channels)
    block = (tile.block_c, tile.block_k) if first else (tile.block_k, tile.block_c)
    x_desc = image(x, product.channels, product.in_h, product.in_w, tile.block_c, product.stride == 2)
    w_desc = _descriptor(weight, (rows, product.kernel**2 * columns), block)
    written = (product.out_channels, product.out_h, product.out_w, tile.block_k, product.transpose)
    out_desc = image(out, *written)
    y_prev_desc = None if y_prev is None else image(y_prev, *written)
    c_blocks = triton.cdiv(product.channels, tile.block_c)
    settings = _settings(product, epilogue, tile)
    settings |= {"SAMPLES": tile.samples, "HEIGHT": tile.height, "WIDTH": tile.width}
    if product.transpose:
        operands = (x_desc, w_desc, bias, skip, y_prev_desc, out_desc, partial)
        sizes = (product.batch, product.in_h, product.in_w, product.out_channels, c_blocks, alpha)
        return conv_tma._conv_transpose_tma_kernel, (*operands, *sizes), settings
    operands = (x_desc, w_desc, bias, y_prev_desc, out_desc, partial)
    sizes = (product.batch, product.out_h, product.out_w, product.channels, product.out_channels, c_blocks, alpha)
    return conv_tma._conv_tma_kernel, (*operands, *sizes), settings


def _aligned(x: Tensor) -> Tensor:
    """x, copied where it does not begin at a multiple of 16 bytes.

    Descriptors need that, and Triton would make a second binary of a pointer kernel without it.
    """
    return x if x.data_ptr() % 16 == 0 else x.clone()


def _descriptor(x: Tensor, shape: Sequence[int], block: Sequence[int]) -> Any:
    """A host-side descriptor of dense memory, in Triton 3.4 and later."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    strides = [1]
    for size in reversed(shape[1:]):
        strides.insert(0, strides[0] * size)
    return TensorDescriptor(x, list(shape), strides, list(block))
