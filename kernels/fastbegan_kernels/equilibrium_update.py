"""equilibrium_update: BEGAN's k, M and running means, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import choose, require_fused


def equilibrium_update(
    loss_real: Tensor,
    loss_fake: Tensor,
    k: Tensor,
    sums: Tensor,
    window: Tensor,
    skip: Tensor | None = None,
    *,
    gamma: float,
    lambda_k: float,
    impl: str | None = None,
) -> None:
    """As `reference.equilibrium_update`, in place; the fused tier is one launch fed by per-sample losses [N]."""
    if choose(impl) != "fused":
        reference.equilibrium_update(loss_real, loss_fake, k, sums, window, skip, gamma=gamma, lambda_k=lambda_k)
        return
    if loss_real.shape != loss_fake.shape:
        raise ValueError(f"loss_real is {list(loss_real.shape)} but loss_fake {list(loss_fake.shape)}; they must match")
    require_fused(loss_real, loss_fake, k)
    _equilibrium_update(loss_real, loss_fake, k, sums, window, skip, gamma, lambda_k)


@torch.library.custom_op("fastbegan::equilibrium_update", mutates_args=("k", "sums", "window"))
def _equilibrium_update(
    loss_real: Tensor, loss_fake: Tensor, k: Tensor, sums: Tensor, window: Tensor, skip: Tensor | None, gamma: float,
    lambda_k: float,
) -> None:  # fmt: skip
    from .fused import launch

    launch.equilibrium_update(loss_real, loss_fake, k, sums, window, skip, gamma=gamma, lambda_k=lambda_k)
