# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and its range as never iterated)
"""The kernel of the reconstruction loss and its gradients, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .memory import total

_BLOCK = 1024  # values of a program


@triton.jit
def _slope(difference, ETA: tl.constexpr):
    """Derivative of |difference|^ETA, 0 at 0. NaN stays NaN."""
    sign = tl.where(difference > 0, 1.0, tl.where(difference < 0, -1.0, difference))
    return sign if ETA == 1 else 2.0 * difference


@triton.jit
def _l1_kernel(  # noqa: PLR0913
    prediction_ptr,
    target_ptr,
    scale_ptr,
    partial_ptr,
    d_prediction_ptr,
    d_target_ptr,
    values,
    ETA: tl.constexpr,
    LOSS: tl.constexpr,
    GRADIENT: tl.constexpr,
    TO_TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One pass over a block of one sample's `values`.

    LOSS: partial[sample, block] = sum of |prediction - target|^ETA. GRADIENT: d_prediction = derivative of the sample's
    mean times scale[sample]. TO_TARGET: d_target = -d_prediction.
    """
    blocks = tl.cdiv(values, BLOCK)
    sample = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < values
    offset = sample * values + i
    prediction = tl.load(prediction_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + offset, mask=ok, other=0.0).to(tl.float32)
    difference = prediction - target
    if LOSS:
        error = tl.abs(difference) if ETA == 1 else difference * difference
        tl.store(partial_ptr + tl.program_id(0), tl.sum(error, 0))
    if GRADIENT:
        gradient = _slope(difference, ETA) * (tl.load(scale_ptr + sample).to(tl.float32) / values)
        tl.store(d_prediction_ptr + offset, gradient.to(d_prediction_ptr.dtype.element_ty), mask=ok)
        if TO_TARGET:
            tl.store(d_target_ptr + offset, (-gradient).to(d_target_ptr.dtype.element_ty), mask=ok)


def _same_layout(prediction: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """Both dense, sample after sample, with the same order of elements inside a sample."""
    images = prediction.dim() == 4 and prediction.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if images else torch.contiguous_format
    return prediction.contiguous(memory_format=layout), target.contiguous(memory_format=layout)


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
        with torch.cuda.device_of(prediction):
            _l1_kernel[(samples * blocks,)](*tensors, values, ETA=eta, BLOCK=_BLOCK, **settings)
    return None if partial is None else total(partial, 1) / values, d_prediction, d_target
