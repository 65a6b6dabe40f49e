# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and its range as never iterated)
"""Activations inside other kernels, and the kernels around a convolution of the library, with their launchers.

Rows are pixels of a channels_last map. Memory traffic bounds these kernels. Offsets into maps are 64-bit, since a batch
can exceed 2^31 values.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..layout import lay_out
from .memory import total
from .skip_phase_table import skip_entry, table_memory


@triton.jit
def activate(z, ACTIVATION: tl.constexpr, alpha):
    """act(z) for elu, relu, leaky_relu and none, in float32."""
    if ACTIVATION == "elu":
        y = tl.where(z > 0, z, alpha * (tl.exp(z) - 1.0))  # NaN stays NaN; an infinite exp is not selected
    elif ACTIVATION == "relu":
        y = tl.maximum(z, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "leaky_relu":
        y = tl.where(z > 0, z, alpha * z)
    else:
        y = z
    return y


@triton.jit
def derivative(y, ACTIVATION: tl.constexpr, alpha):
    """act'(z) from y = act(z); exact for alpha >= 0, where the sign of y is that of z."""
    if ACTIVATION == "elu":
        d = tl.where(y > 0, 1.0, y + alpha)
    elif ACTIVATION == "relu":
        d = tl.where(y > 0, 1.0, 0.0)
    elif ACTIVATION == "leaky_relu":
        d = tl.where(y > 0, 1.0, alpha)
    else:
        d = tl.full(y.shape, 1.0, tl.float32)
    return d


@triton.jit
def _activation_kernel(  # noqa: PLR0913
    y_ptr,
    b_ptr,
    skip_ptr,
    rows,
    height,
    width,
    K,
    alpha,
    HAS_BIAS: tl.constexpr,
    SKIP_SIZE: tl.constexpr,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """y = act(y + bias + skip table) in place over [rows = N * height * width, K], after a library convolution."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ok = (m < rows)[:, None] & (k < K)[None, :]
    offset = m[:, None] * K + k[None, :]
    z = tl.load(y_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    if HAS_BIAS:
        z += tl.load(b_ptr + k, mask=k < K, other=0.0).to(tl.float32)[None, :]
    if SKIP_SIZE > 0:
        entry = skip_entry(m // (height * width), (m // width) % height, m % width, height, width, SKIP_SIZE)
        entry = tl.where(m < rows, entry, 0)
        z += tl.load(skip_ptr + entry[:, None] * K + k[None, :], mask=ok, other=0.0).to(tl.float32)
    tl.store(y_ptr + offset, activate(z, ACTIVATION, alpha).to(y_ptr.dtype.element_ty), mask=ok)


@triton.jit
def _activation_backward_kernel(  # noqa: PLR0913
    grad_ptr,
    y_ptr,
    out_ptr,
    db_ptr,
    rows,
    K,
    alpha,
    ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out = grad * act'(y) over [rows, K]; db[program, k] is the sum of out over this program's rows."""
    m = tl.program_id(0).to(tl.int64) * BLOCK_M + tl.arange(0, BLOCK_M)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    ok = (m < rows)[:, None] & (k < K)[None, :]
    offset = m[:, None] * K + k[None, :]
    grad = tl.load(grad_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    y = tl.load(y_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    dz = grad * derivative(y, ACTIVATION, alpha)
    tl.store(out_ptr + offset, dz.to(out_ptr.dtype.element_ty), mask=ok)
    tl.store(db_ptr + tl.program_id(0).to(tl.int64) * K + k, tl.sum(tl.where(ok, dz, 0.0), 0), mask=k < K)


def _rows(y: Tensor) -> tuple[int, int, int, dict[str, int]]:
    """Rows and channels of y as a matrix, programs over its rows, and block sizes of a row-wise kernel."""
    rows, channels = y.shape[0] * y.shape[2] * y.shape[3], y.shape[1]
    block_k = min(128, triton.next_power_of_2(channels))
    block_m = max(1, 2048 // block_k)
    return rows, channels, triton.cdiv(rows, block_m), {"BLOCK_M": block_m, "BLOCK_K": block_k}


def activation(y: Tensor, bias: Tensor | None, skip: Tensor | None, *, activation: str, alpha: float) -> Tensor:
    """act(y + bias + skip) of a convolution's output y [N, K, H, W]; overwrites y where that is channels_last."""
    y = lay_out(y, True)
    rows, channels, programs, blocks = _rows(y)
    if y.numel():
        skip = None if skip is None else table_memory(skip)
        # float32, so that one binary serves every dtype of bias
        bias = None if bias is None else bias.float().contiguous()
        sizes = (rows, y.shape[2], y.shape[3], channels, alpha)
        settings: dict[str, Any] = {"HAS_BIAS": bias is not None, "SKIP_SIZE": 0 if skip is None else skip.shape[1]}
        with torch.cuda.device_of(y):
            _activation_kernel[(programs, triton.cdiv(channels, blocks["BLOCK_K"]))](
                y, bias, skip, *sizes, ACTIVATION=activation, **settings, **blocks
            )
    return y


def activation_backward(grad: Tensor, y: Tensor, *, activation: str, alpha: float) -> tuple[Tensor, Tensor]:
    """grad * act'(y), both [N, K, H, W], in y's dtype, and its sum over pixels [K] in float32."""
    grad, y = lay_out(grad, True), lay_out(y, True)
    rows, channels, programs, blocks = _rows(y)
    out = torch.empty_like(y, memory_format=torch.channels_last)
    partial = torch.empty((programs, channels), dtype=torch.float32, device=y.device)
    if y.numel():
        with torch.cuda.device_of(y):
            _activation_backward_kernel[(programs, triton.cdiv(channels, blocks["BLOCK_K"]))](
                grad, y, out, partial, rows, channels, alpha, ACTIVATION=activation, **blocks
            )
    return out, total(partial, 0)
