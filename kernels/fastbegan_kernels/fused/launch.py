# pyright: reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and does not know its launch options)
"""From tensors to kernels: layouts, tiles and grids. Every function here returns newly allocated tensors.

Inputs are on one device. Images are made channels_last; weights arrive as nn.Conv2d holds them and are packed so that
input channels are contiguous. Sums across programs (bias gradients, losses) are written as float32 partials and added
in a fixed order, so results do not vary between runs.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import TypeVar

import torch
import triton
from torch import Tensor

from . import elementwise, implicit_gemm
from .tiles import Tile, pick_tile

Result = TypeVar("Result")

_BLOCK = 1024  # values a program of the elementwise kernels takes


def _nhwc(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def _empty(x: Tensor, channels: int, height: int, width: int) -> Tensor:
    shape = (x.shape[0], channels, height, width)
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def _flags(x: Tensor | None) -> Tensor | None:
    """Booleans as bytes, without a copy."""
    return None if x is None else x.contiguous().view(torch.uint8)


def _precision(x: Tensor) -> str:
    """Exact float32 unless the caller allowed TF32 for convolutions."""
    if not x.is_cuda:
        return "ieee"
    try:
        allowed = torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set through torch's newer fp32_precision
        allowed = torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
    return "tf32" if allowed else "ieee"


def _on_device(function: Callable[..., Result]) -> Callable[..., Result]:
    """Triton launches on the current device: make it that of the first argument."""

    @functools.wraps(function)
    def launched(x: Tensor, *arguments: object, **options: object) -> Result:
        with torch.cuda.device_of(x):
            return function(x, *arguments, **options)

    return launched


def _capability(x: Tensor) -> int:
    """80 for sm_80 and so on; the interpreter stands for sm_80."""
    if not x.is_cuda:
        return 80
    major, minor = torch.cuda.get_device_capability(x.device)
    return 10 * major + minor


def _conv(
    x: Tensor, packed: Tensor, bias: Tensor | None, y_prev: Tensor | None, *, stride: int, padding: int,
    activation: str, alpha: float, tile: Tile | None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """`_conv_kernel` on x [N, C, H, W] and packed weights [K, KH, KW, C]; with y_prev its backward epilogue."""
    x = _nhwc(x)
    batch, channels, in_h, in_w = x.shape
    out_channels, kernel_h, kernel_w, _ = packed.shape
    out_h = (in_h + 2 * padding - kernel_h) // stride + 1
    out_w = (in_w + 2 * padding - kernel_w) // stride + 1
    out = _empty(x, out_channels, out_h, out_w)
    pixels = batch * out_h * out_w
    tile = tile or pick_tile(x.dtype, pixels, channels, out_channels, _capability(x))
    rows = triton.cdiv(pixels, tile.block_m)
    partial = None
    if y_prev is not None:
        y_prev = _nhwc(y_prev)
        partial = torch.empty((rows, out_channels), dtype=torch.float32, device=x.device)
    if pixels:
        implicit_gemm._conv_kernel[(rows, triton.cdiv(out_channels, tile.block_k))](
            x, packed, _dense(bias), y_prev, out, partial,
            pixels, in_h, in_w, out_h, out_w, triton.cdiv(channels, tile.block_c), alpha,
            C=channels, K=out_channels, KH=kernel_h, KW=kernel_w, STRIDE=stride, PAD=padding,
            HAS_BIAS=bias is not None, ACTIVATION=activation, BACKWARD=y_prev is not None, PRECISION=_precision(x),
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_C=tile.block_c, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out, None if partial is None else partial.sum(0)


@_on_device
def conv2d_elu(
    x: Tensor, weight: Tensor, bias: Tensor | None, *, stride: int, activation: str, alpha: float,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """act(conv(x) + bias), "same" padding: [N, C, H, W], [K, C, k, k] -> [N, K, H / stride, W / stride]."""
    packed = weight.to(x.dtype).permute(0, 2, 3, 1).contiguous()
    return _conv(
        x,
        packed,
        bias,
        None,
        stride=stride,
        padding=weight.shape[2] // 2,
        activation=activation,
        alpha=alpha,
        tile=tile,
    )[0]


@_on_device
def conv2d_elu_input_gradient(
    dz: Tensor, weight: Tensor, y_prev: Tensor | None = None, *, activation: str = "none", alpha: float = 1.0,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Input gradient of a stride-1 conv from dz [N, K, H, W]; with y_prev times act'(y_prev), and its sum [C].

    The convolution of dz with the kernel turned by 180 degrees and its channels swapped.
    """
    packed = weight.to(dz.dtype).flip(2, 3).permute(1, 2, 3, 0).contiguous()  # [C, kh, kw, K]
    padding = weight.shape[2] // 2
    activation = "none" if y_prev is None else activation
    return _conv(dz, packed, None, y_prev, stride=1, padding=padding, activation=activation, alpha=alpha, tile=tile)


@_on_device
def upsample_conv2d_elu(
    x: Tensor, phases: Tensor, bias: Tensor | None, skip: Tensor | None, *, activation: str, alpha: float,
    tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """act(conv3x3(nearest_x2(x)) + bias + skip): x [N, C, H, W], phases [4, K, 4, C] -> [N, K, 2H, 2W].

    `skip` is the phase table [N, 3, 3, S, S, K].
    """
    x = _nhwc(x)
    batch, channels, height, width = x.shape
    out_channels = phases.shape[1]
    out = _empty(x, out_channels, 2 * height, 2 * width)
    pixels = batch * height * width
    tile = tile or pick_tile(x.dtype, pixels, channels, out_channels, _capability(x))
    if pixels:
        grid = (triton.cdiv(pixels, tile.block_m), triton.cdiv(out_channels, tile.block_k), 4)
        implicit_gemm._upconv_kernel[grid](
            x, phases, _dense(bias), _dense(skip), out,
            pixels, height, width, triton.cdiv(channels, tile.block_c), alpha,
            C=channels, K=out_channels, HAS_BIAS=bias is not None, SKIP_SIZE=0 if skip is None else skip.shape[3],
            ACTIVATION=activation, PRECISION=_precision(x),
            BLOCK_M=tile.block_m, BLOCK_K=tile.block_k, BLOCK_C=tile.block_c, STAGES=tile.stages,
            num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out


@_on_device
def upsample_conv2d_elu_input_gradient(
    dz: Tensor, folded: Tensor, y_prev: Tensor | None = None, *, activation: str = "none", alpha: float = 1.0,
    tile: Tile | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Input gradient of an up-convolution from dz [N, K, 2H, 2W]; with y_prev times act'(y_prev), and its sum [C].

    `folded` [C, K, 4, 4] are its transposed-convolution weights; the gradient is their 4x4 convolution of stride 2.
    """
    packed = folded.to(dz.dtype).permute(0, 2, 3, 1).contiguous()  # [C, 4, 4, K]
    activation = "none" if y_prev is None else activation
    return _conv(dz, packed, None, y_prev, stride=2, padding=1, activation=activation, alpha=alpha, tile=tile)


@_on_device
def activation_backward(grad: Tensor, y: Tensor, *, activation: str, alpha: float) -> tuple[Tensor, Tensor]:
    """grad * act'(y), both [N, K, H, W], in y's dtype, and its sum over pixels [K] in float32."""
    grad, y = _nhwc(grad), _nhwc(y)
    rows, channels = y.shape[0] * y.shape[2] * y.shape[3], y.shape[1]
    block_k = min(128, triton.next_power_of_2(channels))
    block_m = max(1, 4096 // block_k)
    out = torch.empty_like(y, memory_format=torch.channels_last)
    programs = triton.cdiv(rows, block_m)
    partial = torch.empty((programs, channels), dtype=torch.float32, device=y.device)
    if rows:
        elementwise._activation_backward_kernel[(programs, triton.cdiv(channels, block_k))](
            grad, y, out, partial, rows, alpha, K=channels, ACTIVATION=activation, BLOCK_M=block_m, BLOCK_K=block_k
        )
    return out, partial.sum(0)


def _same_layout(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both dense, samples apart, elements in the same order inside a sample."""
    images = prediction.dim() == 4 and prediction.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if images else torch.contiguous_format
    return prediction.contiguous(memory_format=layout), target.contiguous(memory_format=layout)


@_on_device
def l1_reconstruction_loss(prediction: Tensor, target: Tensor, *, eta: int) -> Tensor:
    """Per-sample means of |target - prediction|^eta: [N, ...] -> float32 [N], in one pass."""
    prediction, target = _same_layout(prediction, target)
    samples, values = prediction.shape[0], prediction[:1].numel()
    blocks = triton.cdiv(values, _BLOCK)
    partial = torch.empty((samples, blocks), dtype=torch.float32, device=prediction.device)
    if samples and values:
        elementwise._l1_forward_kernel[(samples, blocks)](prediction, target, partial, values, ETA=eta, BLOCK=_BLOCK)
    return partial.sum(1) / values


@_on_device
def l1_reconstruction_loss_gradient(
    grad: Tensor, prediction: Tensor, target: Tensor, *, eta: int, to_target: bool
) -> tuple[Tensor, Tensor]:
    """Gradients to prediction and, `to_target`, to target (else an empty tensor), scaled by grad [N] float32."""
    prediction, target = _same_layout(prediction, target)
    samples, values = prediction.shape[0], prediction[:1].numel()
    d_prediction = torch.empty_like(prediction)
    d_target = torch.empty_like(target) if to_target else target.new_empty(0)
    if samples and values:
        elementwise._l1_backward_kernel[(samples, triton.cdiv(values, _BLOCK))](
            prediction, target, grad.contiguous(), d_prediction, d_target, values,
            ETA=eta, TO_TARGET=to_target, BLOCK=_BLOCK,
        )  # fmt: skip
    return d_prediction, d_target


@_on_device
def normalize_images(images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    """uint8 [M, H, W, C] -> [N, C, H, W] in [-1, 1], channels_last; indices must be in range."""
    images = images.contiguous()
    _, height, width, channels = images.shape
    count = len(images) if index is None else len(index)
    shape = (count, channels, height, width)
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    values = height * width * channels
    if count and values:
        elementwise._normalize_images_kernel[(count, triton.cdiv(values, _BLOCK))](
            images, _dense(index), _flags(flip), out, height, width,
            C=channels, HAS_INDEX=index is not None, HAS_FLIP=flip is not None, BLOCK=_BLOCK,
        )  # fmt: skip
    return out


@_on_device
def equilibrium_update(
    loss_real: Tensor, loss_fake: Tensor, k: Tensor, sums: Tensor, window: Tensor, skip: Tensor | None, *,
    gamma: float, lambda_k: float,
) -> None:  # fmt: skip
    """Advance k [], sums [6] and window [2] in place from per-sample losses [N]; one launch of one program."""
    elementwise._equilibrium_update_kernel[(1,)](
        loss_real.contiguous(), loss_fake.contiguous(), _flags(skip), k, sums, window,
        loss_real.numel(), gamma, lambda_k, HAS_SKIP=skip is not None, BLOCK=256,
    )  # fmt: skip
