# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and its range as never iterated)
"""Kernels of group_norm_silu, and their launchers.

Maps are [N, H * W, C] in memory (channels_last). A program takes pixels of one sample and a block of channels, so loads
are coalesced for every number of channels in a group. Statistics are first taken per channel and split of the pixels,
then combined per group in a fixed order: results repeat bit for bit, and large groups keep the whole chip busy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

_ROWS = 1024  # pixels of a split: 256 splits for a map of 512 x 512
_PIXELS, _CHANNELS, _PARTS = 32, 64, 1024


@triton.jit
def _silu(z, SILU: tl.constexpr):
    return z / (1.0 + tl.exp(-z)) if SILU else z


@triton.jit
def _slope(z, SILU: tl.constexpr):
    """Derivative of the activation at z."""
    if SILU:
        s = 1.0 / (1.0 + tl.exp(-z))
        d = s * (1.0 + z * (1.0 - s))
    else:
        d = tl.full(z.shape, 1.0, tl.float32)
    return d


@triton.jit
def _moments_kernel(  # noqa: PLR0913
    x_ptr, mean_ptr, square_ptr, pixels, splits, C, ROWS: tl.constexpr, M: tl.constexpr, K: tl.constexpr
):
    """Of each channel over the ROWS pixels of a split: the mean, and the sum of squares around it, [N, splits, C]."""
    n = (tl.program_id(0) // splits).to(tl.int64)
    start = tl.program_id(0) % splits * ROWS
    stop = tl.minimum(start + ROWS, pixels)
    c = tl.program_id(1) * K + tl.arange(0, K)
    # around a value of the map: a mean of 1000 costs no digits of a deviation of 1
    origin = tl.load(x_ptr + (n * pixels + start) * C + c, mask=c < C, other=0.0).to(tl.float32)
    mean = tl.zeros((K,), tl.float32)
    square = tl.zeros((K,), tl.float32)
    for first in range(start, stop, M):
        m = first + tl.arange(0, M)
        ok = (m < stop)[:, None] & (c < C)[None, :]
        x = tl.load(x_ptr + (n * pixels + m)[:, None] * C + c[None, :], mask=ok, other=0.0).to(tl.float32)
        x = tl.where(ok, x - origin[None, :], 0.0)
        before = (first - start).to(tl.float32)
        count = tl.minimum(M, stop - first).to(tl.float32)
        block = tl.sum(x, 0) / count
        centred = tl.where(ok, x - block[None, :], 0.0)
        change = block - mean
        mean += change * (count / (before + count))
        square += tl.sum(centred * centred, 0) + change * change * (before * count / (before + count))
    part = tl.program_id(0).to(tl.int64) * C + c
    tl.store(mean_ptr + part, origin + mean, mask=c < C)
    tl.store(square_ptr + part, square, mask=c < C)


@triton.jit
def _combine_kernel(  # noqa: PLR0913
    mean_ptr,
    square_ptr,
    group_mean_ptr,
    group_rstd_ptr,
    pixels,
    splits,
    C,
    depth,
    eps,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Mean and 1 / sqrt(variance + eps) of each group of `depth` channels, [N, groups], from `_moments_kernel`'s."""
    groups = C // depth
    n = (tl.program_id(0) // groups).to(tl.int64)
    channel = tl.program_id(0) % groups * depth
    parts = splits * depth
    count = (pixels * 1.0) * depth  # a size of one is a compile-time number, which has no method
    origin = tl.load(mean_ptr + n * splits * C + channel)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK):
        i = first + tl.arange(0, BLOCK)
        split = i // depth
        rows = tl.minimum(ROWS, pixels - split * ROWS).to(tl.float32)
        mean = tl.load(mean_ptr + (n * splits + split) * C + channel + i % depth, mask=i < parts, other=0.0)
        total += tl.where(i < parts, (mean - origin) * rows, 0.0)
    shift = tl.sum(total, 0) / count
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, parts, BLOCK):
        i = first + tl.arange(0, BLOCK)
        split = i // depth
        rows = tl.minimum(ROWS, pixels - split * ROWS).to(tl.float32)
        part = (n * splits + split) * C + channel + i % depth
        off = tl.load(mean_ptr + part, mask=i < parts, other=0.0) - origin - shift
        square = tl.load(square_ptr + part, mask=i < parts, other=0.0)
        total += tl.where(i < parts, square + rows * off * off, 0.0)
    variance = tl.sum(total, 0) / count
    tl.store(group_mean_ptr + tl.program_id(0), origin + shift)
    tl.store(group_rstd_ptr + tl.program_id(0), 1.0 / tl.sqrt(variance + eps))


@triton.jit
def _of_channels(  # noqa: PLR0913
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    n,
    c,
    C,
    depth,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    K: tl.constexpr,
):
    """Mean and 1 / standard deviation of each channel's group in sample n, its weight and its bias."""
    group = n * (C // depth) + c // depth
    mean = tl.load(mean_ptr + group, mask=c < C, other=0.0)
    rstd = tl.load(rstd_ptr + group, mask=c < C, other=0.0)
    weight = tl.full((K,), 1.0, tl.float32)
    bias = tl.zeros((K,), tl.float32)
    if HAS_WEIGHT:
        weight = tl.load(weight_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    if HAS_BIAS:
        bias = tl.load(bias_ptr + c, mask=c < C, other=0.0).to(tl.float32)
    return mean, rstd, weight, bias


@triton.jit
def _apply_kernel(  # noqa: PLR0913
    x_ptr,
    y_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    pixels,
    C,
    depth,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """y = act((x - mean) * rstd * weight + bias)."""
    blocks = tl.cdiv(pixels, M)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * M + tl.arange(0, M)
    c = tl.program_id(1) * K + tl.arange(0, K)
    ok = (m < pixels)[:, None] & (c < C)[None, :]
    mean, rstd, weight, bias = _of_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, C, depth, HAS_WEIGHT, HAS_BIAS, K
    )
    offset = (n * pixels + m)[:, None] * C + c[None, :]
    x = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    z = tl.where(ok, x - mean[None, :], 0.0) * (rstd * weight)[None, :] + bias[None, :]
    tl.store(y_ptr + offset, _silu(z, SILU).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _gradient_sums_kernel(  # noqa: PLR0913
    grad_ptr,
    x_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    bias_sum_ptr,
    weight_sum_ptr,
    pixels,
    splits,
    C,
    depth,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    ROWS: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """Of each channel and split, [N, splits, C]: the sums of dz and of dz * xhat, where dz = grad * act'(z)."""
    n = (tl.program_id(0) // splits).to(tl.int64)
    start = tl.program_id(0) % splits * ROWS
    stop = tl.minimum(start + ROWS, pixels)
    c = tl.program_id(1) * K + tl.arange(0, K)
    mean, rstd, weight, bias = _of_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, C, depth, HAS_WEIGHT, HAS_BIAS, K
    )
    bias_sum = tl.zeros((K,), tl.float32)
    weight_sum = tl.zeros((K,), tl.float32)
    for first in range(start, stop, M):
        m = first + tl.arange(0, M)
        ok = (m < stop)[:, None] & (c < C)[None, :]
        offset = (n * pixels + m)[:, None] * C + c[None, :]
        x = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        xhat = tl.where(ok, x - mean[None, :], 0.0) * rstd[None, :]
        grad = tl.load(grad_ptr + offset, mask=ok, other=0.0).to(tl.float32)
        dz = grad * _slope(xhat * weight[None, :] + bias[None, :], SILU)
        bias_sum += tl.sum(tl.where(ok, dz, 0.0), 0)
        weight_sum += tl.sum(tl.where(ok, dz * xhat, 0.0), 0)
    part = tl.program_id(0).to(tl.int64) * C + c
    tl.store(bias_sum_ptr + part, bias_sum, mask=c < C)
    tl.store(weight_sum_ptr + part, weight_sum, mask=c < C)


@triton.jit
def _gradient_kernel(  # noqa: PLR0913
    grad_ptr,
    x_ptr,
    dx_ptr,
    mean_ptr,
    rstd_ptr,
    weight_ptr,
    bias_ptr,
    along_one_ptr,
    along_x_ptr,
    pixels,
    C,
    depth,
    HAS_WEIGHT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    SILU: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """dx = rstd * (dz * weight - along_one - xhat * along_x): what moves mean and variance is taken out."""
    blocks = tl.cdiv(pixels, M)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    m = tl.program_id(0) % blocks * M + tl.arange(0, M)
    c = tl.program_id(1) * K + tl.arange(0, K)
    ok = (m < pixels)[:, None] & (c < C)[None, :]
    mean, rstd, weight, bias = _of_channels(
        mean_ptr, rstd_ptr, weight_ptr, bias_ptr, n, c, C, depth, HAS_WEIGHT, HAS_BIAS, K
    )
    group = n * (C // depth) + c // depth
    along_one = tl.load(along_one_ptr + group, mask=c < C, other=0.0)
    along_x = tl.load(along_x_ptr + group, mask=c < C, other=0.0)
    offset = (n * pixels + m)[:, None] * C + c[None, :]
    x = tl.load(x_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    xhat = tl.where(ok, x - mean[None, :], 0.0) * rstd[None, :]
    grad = tl.load(grad_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    dz = grad * _slope(xhat * weight[None, :] + bias[None, :], SILU)
    dx = rstd[None, :] * (dz * weight[None, :] - along_one[None, :] - xhat * along_x[None, :])
    tl.store(dx_ptr + offset, dx.to(dx_ptr.dtype.element_ty), mask=ok)


def _sizes(x: Tensor) -> tuple[int, int, int, int, int]:
    """Pixels of a map, splits of them, and the numbers of programs: for splits, for blocks of pixels, for channels."""
    samples, channels, height, width = x.shape
    pixels = height * width
    splits = triton.cdiv(pixels, _ROWS)
    return pixels, splits, samples * splits, samples * triton.cdiv(pixels, _PIXELS), triton.cdiv(channels, _CHANNELS)


def _dense(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


def forward(
    x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float, *, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """y [N, C, H, W] channels_last, and each group's mean and 1 / standard deviation, float32 [N, groups]."""
    x = x.contiguous(memory_format=torch.channels_last)
    weight, bias = _dense(weight), _dense(bias)
    samples, channels = x.shape[:2]
    pixels, splits, by_split, by_block, by_channel = _sizes(x)
    depth = channels // groups
    means, squares = torch.empty((2, samples, splits, channels), dtype=torch.float32, device=x.device)
    mean, rstd = (torch.empty((samples, groups), dtype=torch.float32, device=x.device) for _ in range(2))
    y = torch.empty_like(x)
    if not x.numel():
        return y, mean, rstd
    tile = {"M": _PIXELS, "K": _CHANNELS}
    _moments_kernel[by_split, by_channel](x, means, squares, pixels, splits, channels, ROWS=_ROWS, **tile)
    _combine_kernel[samples * groups,](
        means, squares, mean, rstd, pixels, splits, channels, depth, eps, ROWS=_ROWS, BLOCK=_PARTS
    )
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "SILU": silu}
    _apply_kernel[by_block, by_channel](x, y, mean, rstd, weight, bias, pixels, channels, depth, **flags, **tile)
    return y, mean, rstd


def backward(
    grad: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor | None, bias: Tensor | None, *, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [N, C, H, W] channels_last in x's dtype; the gradients of weight and bias, float32 [C]."""
    grad, x = (value.contiguous(memory_format=torch.channels_last) for value in (grad, x))
    weight, bias = _dense(weight), _dense(bias)
    samples, channels = x.shape[:2]
    groups, (pixels, splits, by_split, by_block, by_channel) = mean.shape[1], _sizes(x)
    depth = channels // groups
    dx = torch.empty_like(x)
    if not x.numel():
        d_weight, d_bias = (x.new_zeros(channels, dtype=torch.float32) for _ in range(2))
        return dx, d_weight, d_bias
    sums = torch.empty((2, samples, splits, channels), dtype=torch.float32, device=x.device)
    statistics = (mean, rstd, weight, bias)
    flags = {"HAS_WEIGHT": weight is not None, "HAS_BIAS": bias is not None, "SILU": silu}
    flags |= {"M": _PIXELS, "K": _CHANNELS}
    _gradient_sums_kernel[by_split, by_channel](
        grad, x, *statistics, sums[0], sums[1], pixels, splits, channels, depth, ROWS=_ROWS, **flags
    )
    d_bias, d_weight = by_sample = sums.sum(2, dtype=torch.float64)  # [N, C] each
    scaled = by_sample if weight is None else by_sample * weight
    along = (scaled.unflatten(2, (groups, depth)).sum(3) / (pixels * depth)).float()
    _gradient_kernel[by_block, by_channel](
        grad, x, dx, *statistics, along[0], along[1], pixels, channels, depth, **flags
    )
    return dx, d_weight.sum(0).float(), d_bias.sum(0).float()
