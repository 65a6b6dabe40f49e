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
    """One program advances k and the running sums from per-sample losses. Where skip holds, it stores nothing.

    sums are those of L(x), L(G(z)), k, M, |L(x) - L(G(z))| and 1; window has M and 1.
    """
    i = tl.arange(0, BLOCK)
    real_sum = tl.zeros((BLOCK,), tl.float32)
    fake_sum = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, samples, BLOCK):
        ok = start + i < samples
        real_sum += tl.load(real_ptr + start + i, mask=ok, other=0.0)
        fake_sum += tl.load(fake_ptr + start + i, mask=ok, other=0.0)
    real = tl.sum(real_sum, 0) / samples
    fake = tl.sum(fake_sum, 0) / samples
    j = tl.arange(0, 8)
    k = tl.load(k_ptr)
    sums = tl.load(sums_ptr + j, mask=j < 6, other=0.0)
    window = tl.load(window_ptr + j, mask=j < 2, other=0.0)
    go = j >= 0
    if HAS_SKIP:
        go = tl.load(skip_ptr + 0 * j) == 0
    tl.debug_barrier()  # all threads have read the state, which one of them overwrites
    balance = gamma * real - fake
    measure = real + tl.abs(balance)
    of_k = tl.where(j == 2, k, tl.where(j == 3, measure, tl.where(j == 4, tl.abs(real - fake), 1.0)))
    sums += tl.where(j == 0, real, tl.where(j == 1, fake, of_k))
    tl.store(sums_ptr + j, sums, mask=go & (j < 6))
    tl.store(window_ptr + j, window + tl.where(j == 0, measure, 1.0).to(tl.float64), mask=go & (j < 2))
    new_k = tl.maximum(k + lambda_k * balance, 0.0, propagate_nan=tl.PropagateNan.ALL)
    tl.store(k_ptr + j, tl.minimum(new_k, 1.0, propagate_nan=tl.PropagateNan.ALL), mask=go & (j == 0))


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
