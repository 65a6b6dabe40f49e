"""equilibrium_update: BEGAN's k, M and running means, on the device."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, tuning
from .dispatch import op_impl


def equilibrium_update(  # noqa: PLR0913
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
    reference.check_controller(gamma, lambda_k)
    if loss_real.shape != loss_fake.shape and loss_real.numel() != loss_fake.numel():
        raise ValueError(f"loss_real is {list(loss_real.shape)} but loss_fake {list(loss_fake.shape)}; they must match")
    for name, given, size, dtype in (
        ("k", k, 1, None),
        ("sums", sums, 6, k.dtype),
        ("window", window, 2, torch.float64),
    ):
        if given.numel() != size or not given.is_contiguous() or (dtype is not None and given.dtype != dtype):
            accepted = f"{size} dense values of {dtype or 'a floating-point type'}"
            raise ValueError(f"{name} is {given.dtype} {list(given.shape)}; accepted: {accepted}")
    if skip is not None and (skip.dtype != torch.bool or skip.numel() != 1):
        raise ValueError(f"skip is {skip.dtype} {list(skip.shape)}; accepted: one torch.bool")
    mode = op_impl(impl, (loss_real, loss_fake, k), (torch.float32,))
    if mode is None:
        reference.equilibrium_update(loss_real, loss_fake, k, sums, window, skip, gamma=gamma, lambda_k=lambda_k)
    else:
        _equilibrium_update(loss_real, loss_fake, k, sums, window, skip, gamma, lambda_k, mode)


def update(  # noqa: PLR0913
    loss_real: Tensor, loss_fake: Tensor, k: Tensor, sums: Tensor, window: Tensor, skip: Tensor | None, gamma: float,
    lambda_k: float, fused: bool,
) -> None:  # fmt: skip
    """`equilibrium_update` in the form that is named."""
    if fused:
        from .fused import launch

        launch.equilibrium_update(loss_real, loss_fake, k, sums, window, skip, gamma=gamma, lambda_k=lambda_k)
    else:
        reference.equilibrium_update(loss_real, loss_fake, k, sums, window, skip, gamma=gamma, lambda_k=lambda_k)


@torch.library.custom_op("fastbegan::equilibrium_update", mutates_args=("k", "sums", "window"))
def _equilibrium_update(  # noqa: PLR0913
    loss_real: Tensor, loss_fake: Tensor, k: Tensor, sums: Tensor, window: Tensor, skip: Tensor | None, gamma: float,
    lambda_k: float, impl: str,
) -> None:  # fmt: skip
    fused = tuning.pointwise("equilibrium_update", torch.float32, k.device, impl)
    update(loss_real, loss_fake, k, sums, window, skip, gamma, lambda_k, fused)
