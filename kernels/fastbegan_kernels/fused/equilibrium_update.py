# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and its range as never iterated)
"""The kernel of BEGAN's controller, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .memory import as_bytes


@triton.jit
def _equilibrium_update_kernel(  # noqa: PLR0913
    real_ptr,
    fake_ptr,
    skip_ptr,
    k_ptr,
    sums_ptr,
    window_ptr,
    samples,
    gamma,
    lambda_k,
    HAS_SKIP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One program advances k and the running sums from per-sample losses. Where skip holds, it stores nothing."""
    i = tl.arange(0, BLOCK)
    real_sum = tl.zeros((BLOCK,), tl.float32)
    fake_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, samples, BLOCK):
        ok = start + i < samples
        real_sum += tl.load(real_ptr + start + i, mask=ok, other=0.0)
        fake_sum += tl.load(fake_ptr + start + i, mask=ok, other=0.0)
    real = tl.sum(real_sum, 0) / samples
    fake = tl.sum(fake_sum, 0) / samples
    k = tl.load(k_ptr)
    balance = gamma * real - fake
    measure = real + tl.abs(balance)
    go = True
    if HAS_SKIP:
        go = tl.load(skip_ptr) == 0
    tl.store(sums_ptr + 0, tl.load(sums_ptr + 0) + real, mask=go)
    tl.store(sums_ptr + 1, tl.load(sums_ptr + 1) + fake, mask=go)
    tl.store(sums_ptr + 2, tl.load(sums_ptr + 2) + k, mask=go)
    tl.store(sums_ptr + 3, tl.load(sums_ptr + 3) + measure, mask=go)
    tl.store(sums_ptr + 4, tl.load(sums_ptr + 4) + tl.abs(real - fake), mask=go)
    tl.store(sums_ptr + 5, tl.load(sums_ptr + 5) + 1.0, mask=go)
    tl.store(window_ptr + 0, tl.load(window_ptr + 0) + measure.to(tl.float64), mask=go)
    tl.store(window_ptr + 1, tl.load(window_ptr + 1) + 1.0, mask=go)
    new_k = tl.maximum(k + lambda_k * balance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(k_ptr, tl.minimum(new_k, 1.0, propagate_nan=tl.PropagateNan.ALL), mask=go)


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
    with torch.cuda.device_of(k):
        _equilibrium_update_kernel[(1,)](
            *(real, fake, as_bytes(skip), k, sums, window, real.numel(), gamma, lambda_k),
            HAS_SKIP=skip is not None,
            BLOCK=256,
        )
