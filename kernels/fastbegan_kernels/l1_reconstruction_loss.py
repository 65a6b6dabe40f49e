"""l1_reconstruction_loss: the pixel-wise loss of an auto-encoder, one number a sample."""

from __future__ import annotations

from torch import Tensor

from . import reference
from .dispatch import choose


def l1_reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    eta: int = 1,
    detach_target: bool = False,
    impl: str | None = None,
) -> Tensor:
    """As `reference.l1_reconstruction_loss`: [N, ...] and [N, ...] -> [N]."""
    choose(impl)
    return reference.l1_reconstruction_loss(prediction, target, eta=eta, detach_target=detach_target)
