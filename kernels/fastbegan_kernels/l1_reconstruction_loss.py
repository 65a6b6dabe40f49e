"""l1_reconstruction_loss: the pixel-wise loss of an auto-encoder, one number a sample."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import choose, require_fused


def l1_reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    eta: int = 1,
    detach_target: bool = False,
    impl: str | None = None,
) -> Tensor:
    """As `reference.l1_reconstruction_loss`: [N, ...] and [N, ...] -> [N].

    The fused tier reads each input once forward and once backward and writes the gradients, nothing else; sums are
    added in a fixed order.
    """
    if choose(impl) != "fused":
        return reference.l1_reconstruction_loss(prediction, target, eta=eta, detach_target=detach_target)
    reference.check_loss(prediction, target, eta)
    require_fused(prediction, target)
    return _l1_reconstruction_loss(prediction, target.detach() if detach_target else target, eta)


@torch.library.custom_op("fastbegan::l1_reconstruction_loss", mutates_args=())
def _l1_reconstruction_loss(prediction: Tensor, target: Tensor, eta: int) -> Tensor:
    from .fused import launch

    return launch.l1_reconstruction_loss(prediction, target, eta=eta)


@_l1_reconstruction_loss.register_fake
def _(prediction: Tensor, target: Tensor, eta: int) -> Tensor:
    return prediction.new_empty(prediction.shape[0], dtype=torch.float32)


@torch.library.custom_op("fastbegan::l1_reconstruction_loss_backward", mutates_args=())
def _l1_reconstruction_loss_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, eta: int, to_target: bool
) -> tuple[Tensor, Tensor]:
    from .fused import launch

    return launch.l1_reconstruction_loss_gradient(grad, prediction, target, eta=eta, to_target=to_target)


@_l1_reconstruction_loss_backward.register_fake
def _(grad: Tensor, prediction: Tensor, target: Tensor, eta: int, to_target: bool) -> tuple[Tensor, Tensor]:
    images = prediction.dim() == 4 and prediction.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if images else torch.contiguous_format
    d_prediction = torch.empty(prediction.shape, dtype=prediction.dtype, device=prediction.device, memory_format=layout)
    if not to_target:
        return d_prediction, target.new_empty(0)
    return d_prediction, torch.empty(target.shape, dtype=target.dtype, device=target.device, memory_format=layout)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    prediction, target, ctx.eta = inputs
    ctx.save_for_backward(prediction, target)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    prediction, target = ctx.saved_tensors
    to_target = ctx.needs_input_grad[1]
    d_prediction, d_target = _l1_reconstruction_loss_backward(grad, prediction, target, ctx.eta, to_target)
    return d_prediction if ctx.needs_input_grad[0] else None, d_target if to_target else None, None


_l1_reconstruction_loss.register_autograd(_backward, setup_context=_setup)
