# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and does not know its launch options)
"""Launchers of the kernels: they choose memory formats, tiles and grids. Results are newly allocated tensors.

Inputs are on one device and have one dtype; biases may be float32. Images and weights are copied to channels_last where
they are not. A layer's kind is "same" (stride 1), "down" (stride 2) or "up" (nearest x2 before a 3x3 kernel, given by
its folded weights [C, K, 4, 4]). Programs write their parts of a sum (bias gradients, losses) as float32 partials.
These are added in a fixed order, so results repeat bit for bit.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
import triton
from torch import Tensor

from ..dispatch import allows_tf32
from ..reference import output_size
from . import elementwise, implicit_gemm
from .tiles import AnyTile, Product, Tile, TmaTile, tiles_for

Result = TypeVar("Result")

_BLOCK = 1024  # values per program of the elementwise kernels


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _total(partial: Tensor, dim: int) -> Tensor:
    """The sum of the programs' partials in a fixed order, in float64, as there may be thousands."""
    return partial.sum(dim, dtype=torch.float64).float()


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _bias(bias: Tensor | None) -> Tensor | None:
    """Dense and float32, so that one binary serves every dtype of bias."""
    return None if bias is None else bias.float().contiguous()


def _flags(x: Tensor | None) -> Tensor | None:
    """Booleans as bytes, without a copy."""
    return None if x is None else x.contiguous().view(torch.uint8)


def _skip_memory(table: Tensor | None) -> Tensor | None:
    """A phase table [N, 3, 3, S, S, K] as [N, S, S, 3, 3, K], the memory order of `skip_phase_table`'s result."""
    return None if table is None else table.permute(0, 3, 4, 1, 2, 5).contiguous()


def on_device(function: Callable[..., Result]) -> Callable[..., Result]:
    """Make the device of the first argument the current one, on which Triton launches."""

    @functools.wraps(function)
    def launched(x: Tensor, *arguments: object, **options: object) -> Result:
        with torch.cuda.device_of(x):
            return function(x, *arguments, **options)

    return launched


def _capability(device: torch.device) -> int:
    """80 for sm_80 and so on. The interpreter stands for sm_90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


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


def product_of(x: Sequence[int], weight: Sequence[int], kind: str, *, backward: bool) -> Product:
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
        batch=batch,
        channels=channels,
        out_channels=out_channels,
        in_h=in_h,
        in_w=in_w,
        out_h=out_h,
        out_w=out_w,
    )


def layer_tiles(
    x: Sequence[int], weight: Sequence[int], kind: str, dtype: torch.dtype, device: torch.device, *, backward: bool
) -> list[AnyTile]:
    """The tiles to measure for a layer of these shapes, or its input gradient. Unmeasured, the first is used."""
    descriptors = importlib.util.find_spec("triton.tools.tensor_descriptor") is not None
    return tiles_for(
        product_of(x, weight, kind, backward=backward), dtype, _capability(device), descriptors=descriptors
    )


@on_device
def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    *,
    kind: str,
    activation: str,
    alpha: float,
    tile: AnyTile | None = None,
) -> Tensor:
    """act(conv(x) + bias + skip): x [N, C, H, W] -> [N, K, H', W'].

    weight is [K, C, k, k] (k 1 or 3, "same" padding), for kind "up" the folded [C, K, 4, 4]; `skip` is the phase table
    [N, 3, 3, S, S, K], for kind "up" only.
    """
    product = product_of(x.shape, weight.shape, kind, backward=False)
    epilogue = _Epilogue(_bias(bias), _skip_memory(skip), None, activation, float(alpha))
    return _run(product, x, weight, epilogue, tile)[0]


@on_device
def input_gradient(
    dz: Tensor,
    weight: Tensor,
    y_prev: Tensor | None = None,
    *,
    kind: str,
    size: tuple[int, int],
    activation: str = "none",
    alpha: float = 1.0,
    tile: AnyTile | None = None,
) -> tuple[Tensor, Tensor | None]:
    """The gradient dx at a layer's input [N, C, *size] from dz; stride 2 needs a 3x3 kernel.

    With y_prev, the output of the activation before the layer: dx * act'(y_prev), and its sum over pixels [C], float32.
    """
    product = product_of((len(dz), 0, *size), weight.shape, kind, backward=True)
    y_prev = None if y_prev is None else _aligned(_nhwc(y_prev))
    epilogue = _Epilogue(None, None, y_prev, "none" if y_prev is None else activation, float(alpha))
    return _run(product, dz, weight, epilogue, tile)


class _Epilogue(NamedTuple):
    """The work after a matrix product: bias, skip and activation, or with y_prev an activation's derivative."""

    bias: Tensor | None
    skip: Tensor | None  # [N, S, S, 3, 3, K]
    y_prev: Tensor | None
    activation: str
    alpha: float  # a float: an integer would be another binary

    @property
    def settings(self) -> dict[str, Any]:
        return {"HAS_BIAS": self.bias is not None, "ACTIVATION": self.activation, "BACKWARD": self.y_prev is not None}

    @property
    def skip_size(self) -> int:
        return 0 if self.skip is None else self.skip.shape[1]


def _run(
    product: Product, x: Tensor, weight: Tensor, epilogue: _Epilogue, tile: AnyTile | None
) -> tuple[Tensor, Tensor | None]:
    """One matrix product with its epilogue. The second result is the bias gradient where there is y_prev."""
    x, weight = _aligned(_nhwc(x)), _aligned(_nhwc(weight.to(x.dtype)))
    if tile is None:
        tile = tiles_for(product, x.dtype, _capability(x.device), descriptors=False)[0]
    out = _empty(x, product.out_channels, product.out_h, product.out_w)
    # the third axis of the grid is the phase of a transposed convolution
    grid = (product.tiles(tile), triton.cdiv(product.out_channels, tile.block_k), 4 if product.transpose else 1)
    partial = None
    if epilogue.y_prev is not None:
        partial = torch.empty((grid[0] * grid[2], product.out_channels), dtype=torch.float32, device=x.device)
    if out.numel() and isinstance(tile, TmaTile):
        _run_tma(product, x, weight, epilogue, out, partial, tile, grid)
    elif out.numel():
        _run_pointer(product, x, weight, epilogue, out, partial, tile, grid)
    return out, None if partial is None else _total(partial, 0)


def _tile_settings(tile: AnyTile) -> dict[str, int]:
    blocks = {"BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c}
    return blocks | {"STAGES": tile.stages, "num_stages": tile.stages, "num_warps": tile.warps}


def _run_pointer(
    product: Product,
    x: Tensor,
    weight: Tensor,
    epilogue: _Epilogue,
    out: Tensor,
    partial: Tensor | None,
    tile: Tile,
    grid: tuple[int, int, int],
) -> None:
    bias, skip, y_prev, _, alpha = epilogue
    maps = (product.rows, product.in_h, product.in_w, product.out_h, product.out_w)
    sizes = (*maps, product.channels, product.out_channels, triton.cdiv(product.channels, tile.block_c), alpha)
    settings: dict[str, Any] = epilogue.settings | _tile_settings(tile)
    settings |= {"KERNEL": product.kernel, "FULL_C": product.channels % tile.block_c == 0, "ALIGNED": product.aligned}
    settings |= {"BLOCK_M": tile.block_m, "PRECISION": "tf32" if allows_tf32() else "ieee"}
    if product.transpose:
        tensors = (x, weight, bias, skip, y_prev, out, partial)
        implicit_gemm._conv_transpose_kernel[grid](*tensors, *sizes, SKIP_SIZE=epilogue.skip_size, **settings)
    else:
        settings |= {"STRIDE": product.stride, "PAD": product.padding, "TURNED": product.turned}
        implicit_gemm._conv_kernel[grid](x, weight, bias, y_prev, out, partial, *sizes, **settings)


def _run_tma(
    product: Product,
    x: Tensor,
    weight: Tensor,
    epilogue: _Epilogue,
    out: Tensor,
    partial: Tensor | None,
    tile: TmaTile,
    grid: tuple[int, int, int],
) -> None:
    from . import tma

    def image(t: Tensor, channels: int, height: int, width: int, block_c: int, halves: bool) -> Any:
        batch, area = t.shape[0], (tile.height, tile.width)
        if not halves:
            return _descriptor(t, (batch, height, width, channels), (tile.samples, *area, block_c))
        # stride 2 as parity: [N, H / 2, 2, W / 2, 2 C], of which a block has one row parity (see tma)
        shape = (batch, height // 2, 2, width // 2, 2 * channels)
        return _descriptor(t, shape, (tile.samples, area[0], 1, area[1], block_c))

    bias, skip, y_prev, _, alpha = epilogue
    first = product.transpose or product.turned
    taps = product.kernel**2
    rows, columns = (product.channels, product.out_channels) if first else (product.out_channels, product.channels)
    block = (tile.block_c, tile.block_k) if first else (tile.block_k, tile.block_c)
    x_desc = image(x, product.channels, product.in_h, product.in_w, tile.block_c, product.stride == 2)
    w_desc = _descriptor(weight, (rows, taps * columns), block)
    written = (product.out_channels, product.out_h, product.out_w, tile.block_k, product.transpose)
    out_desc = image(out, *written)
    y_prev_desc = None if y_prev is None else image(y_prev, *written)
    c_blocks = triton.cdiv(product.channels, tile.block_c)
    settings: dict[str, Any] = epilogue.settings | _tile_settings(tile) | {"KERNEL": product.kernel}
    settings |= {"SAMPLES": tile.samples, "HEIGHT": tile.height, "WIDTH": tile.width}
    if product.transpose:
        operands = (x_desc, w_desc, bias, skip, y_prev_desc, out_desc, partial)
        sizes = (product.batch, product.in_h, product.in_w, product.out_channels, c_blocks, alpha)
        tma._conv_transpose_tma_kernel[grid](*operands, *sizes, SKIP_SIZE=epilogue.skip_size, **settings)
    else:
        operands = (x_desc, w_desc, bias, y_prev_desc, out_desc, partial)
        sizes = (product.batch, product.out_h, product.out_w, product.channels, product.out_channels, c_blocks, alpha)
        settings |= {"STRIDE": product.stride, "PAD": product.padding, "TURNED": product.turned}
        tma._conv_tma_kernel[grid](*operands, *sizes, **settings)


def _rows(y: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Rows and channels of y as a matrix, programs over its rows, and block sizes of a row-wise kernel."""
    rows, channels = y.shape[0] * y.shape[2] * y.shape[3], y.shape[1]
    block_k = min(128, triton.next_power_of_2(channels))
    block_m = max(1, 2048 // block_k)
    return rows, channels, triton.cdiv(rows, block_m), {"BLOCK_M": block_m, "BLOCK_K": block_k}


@on_device
def activation(y: Tensor, bias: Tensor | None, skip: Tensor | None, *, activation: str, alpha: float) -> Tensor:
    """act(y + bias + skip) of a convolution's output y [N, K, H, W]; overwrites y where that is channels_last."""
    y = _nhwc(y)
    rows, channels, programs, blocks = _rows(y)
    if y.numel():
        skip = _skip_memory(skip)
        sizes = (rows, y.shape[2], y.shape[3], channels, alpha)
        settings: dict[str, Any] = {"HAS_BIAS": bias is not None, "SKIP_SIZE": 0 if skip is None else skip.shape[1]}
        elementwise._activation_kernel[(programs, triton.cdiv(channels, blocks["BLOCK_K"]))](
            y, _bias(bias), skip, *sizes, ACTIVATION=activation, **settings, **blocks
        )
    return y


@on_device
def activation_backward(grad: Tensor, y: Tensor, *, activation: str, alpha: float) -> tuple[Tensor, Tensor]:
    """grad * act'(y), both [N, K, H, W], in y's dtype, and its sum over pixels [K] in float32."""
    grad, y = _nhwc(grad), _nhwc(y)
    rows, channels, programs, blocks = _rows(y)
    out = torch.empty_like(y, memory_format=torch.channels_last)
    partial = torch.empty((programs, channels), dtype=torch.float32, device=y.device)
    if y.numel():
        elementwise._activation_backward_kernel[(programs, triton.cdiv(channels, blocks["BLOCK_K"]))](
            grad, y, out, partial, rows, channels, alpha, ACTIVATION=activation, **blocks
        )
    return out, _total(partial, 0)


@on_device
def skip_gradient(dz: Tensor, size: int) -> Tensor:
    """The gradient of a phase table [N, 3, 3, size, size, K]: each entry sums dz [N, K, H, W] over its pixels."""
    dz = _nhwc(dz)
    batch, channels, height, width = dz.shape
    out = torch.empty((batch, size, size, 3, 3, channels), dtype=dz.dtype, device=dz.device)
    if out.numel():
        block_k = min(32, triton.next_power_of_2(channels))
        elementwise._skip_gradient_kernel[(batch * size * size, triton.cdiv(channels, block_k))](
            dz, out, height, width, channels, SIZE=size, BLOCK_W=triton.next_power_of_2(width // size), BLOCK_K=block_k
        )
    return out.permute(0, 3, 4, 1, 2, 5)


def _same_layout(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both dense, sample after sample, with the same order of elements inside a sample."""
    images = prediction.dim() == 4 and prediction.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if images else torch.contiguous_format
    return prediction.contiguous(memory_format=layout), target.contiguous(memory_format=layout)


@on_device
def l1_reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    scale: Tensor | None = None,
    *,
    eta: int,
    loss: bool = True,
    to_target: bool = False,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Per-sample means of |target - prediction|^eta in float32 [N], and gradients, in one pass.

    With `scale`, [N] or one number, float32 on the device: the gradient of sum(scale * loss) to prediction, and with
    `to_target` the one to target. Without `loss` the first result is None.
    """
    prediction, target = _same_layout(prediction, target)
    samples, values = prediction.shape[0], prediction[:1].numel()
    blocks = triton.cdiv(values, _BLOCK)
    partial = torch.empty((samples, blocks), dtype=torch.float32, device=prediction.device) if loss else None
    d_prediction = None if scale is None else torch.empty_like(prediction)
    d_target = torch.empty_like(target) if to_target and scale is not None else None
    if samples and values:
        scales = None if scale is None else scale.expand(samples).contiguous()
        tensors = (prediction, target, scales, partial, d_prediction, d_target)
        settings = {"LOSS": loss, "GRADIENT": scale is not None, "TO_TARGET": d_target is not None}
        elementwise._l1_kernel[(samples * blocks,)](*tensors, values, ETA=eta, BLOCK=_BLOCK, **settings)
    return None if partial is None else _total(partial, 1) / values, d_prediction, d_target


@on_device
def normalize_images(
    images: Tensor, index: Tensor | None, flip: Tensor | None, corner: Tensor | None, margin: int, dtype: torch.dtype
) -> Tensor:
    """A batch [N, C, H - margin, W - margin] in [-1, 1], channels_last, from uint8 images [M, H, W, C].

    Indices and corners are not checked.
    """
    images = images.contiguous()
    height, width, channels = images.shape[1] - margin, images.shape[2] - margin, images.shape[3]
    count = len(images) if index is None else len(index)
    shape = (count, channels, height, width)
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    values = height * width * channels
    if margin and corner is None:
        corner = torch.full((count, 2), margin // 2, device=images.device)
    if count and values:
        tensors = (images, _dense(index), _flags(flip), _dense(corner), out)
        settings = {"HAS_INDEX": index is not None, "HAS_FLIP": flip is not None, "HAS_MARGIN": margin > 0}
        elementwise._normalize_images_kernel[(count * triton.cdiv(values, _BLOCK),)](
            *tensors, height, width, margin, C=channels, BLOCK=_BLOCK, **settings
        )
    return out


@on_device
def equilibrium_update(
    loss_real: Tensor,
    loss_fake: Tensor,
    k: Tensor,
    sums: Tensor,
    window: Tensor,
    skip: Tensor | None,
    *,
    gamma: float,
    lambda_k: float,
) -> None:
    """Advance k [], sums [6] and window [2] in place from per-sample losses [N], in one launch of one program."""
    real, fake = loss_real.contiguous(), loss_fake.contiguous()
    elementwise._equilibrium_update_kernel[(1,)](
        real, fake, _flags(skip), k, sums, window, real.numel(), gamma, lambda_k, HAS_SKIP=skip is not None, BLOCK=256
    )
