"""l1_reconstruction_loss: the pixel-wise loss of an auto-encoder, one number a sample."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from . import reference, tuning
from .dispatch import op_impl
from .recorded import recorded_gradients


def l1_reconstruction_loss(
    prediction: Tensor,
    target: Tensor,
    *,
    eta: int = 1,
    detach_target: bool = False,
    impl: str | None = None,
) -> Tensor:
    """As `reference.l1_reconstruction_loss`: [N, ...] and [N, ...] -> [N].

    The kernel reads each input once forward and once backward and writes the gradients, nothing else; sums are added
    in a fixed order. Where the gradient's scale is known beforehand, `l1_reconstruction_loss_with_gradients` needs one
    pass for both.
    """
    reference.check_loss(prediction, target, eta)
    mode = op_impl(impl, (prediction, target))
    if mode is None or prediction.dtype != target.dtype:
        return reference.l1_reconstruction_loss(prediction, target, eta=eta, detach_target=detach_target)
    return _l1_reconstruction_loss(prediction, target.detach() if detach_target else target, eta, mode)


def l1_reconstruction_loss_with_gradients(
    prediction: Tensor,
    target: Tensor,
    scale: Tensor,
    *,
    eta: int = 1,
    to_target: bool = False,
    impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Losses [N] and, in the same pass, the gradients of sum(scale * loss) to prediction and (`to_target`) to target.

    `scale` is [N] or one number, on the device, so that BEGAN's k never visits the host. Nothing here is recorded by
    autograd: give the gradients to `torch.autograd.backward`. The third result is None without `to_target`.
    """
    reference.check_loss(prediction, target, eta)
    if scale.numel() != 1 and scale.shape != (len(prediction),):
        raise ValueError(f"scale is {list(scale.shape)}; accepted: one number or [{len(prediction)}]")
    mode = op_impl(impl, (prediction, target))
    if mode is None or prediction.dtype != target.dtype:
        return loss_and_gradients(prediction, target, scale, eta=eta, to_target=to_target, fused=False)
    loss, d_prediction, d_target = _with_gradients(prediction, target, scale, eta, to_target, mode)
    return loss, d_prediction, d_target if to_target else None


@torch.no_grad()
def loss_and_gradients(
    prediction: Tensor, target: Tensor, scale: Tensor, *, eta: int, to_target: bool, fused: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """`l1_reconstruction_loss_with_gradients` in the form that is named."""
    if fused:
        from .fused import launch

        loss, d_prediction, d_target = launch.l1_reconstruction_loss(
            prediction, target, scale.float().reshape(-1), eta=eta, to_target=to_target
        )
        assert loss is not None and d_prediction is not None
        return loss, d_prediction, d_target
    loss = reference.l1_reconstruction_loss(prediction, target, eta=eta)
    difference = prediction.to(loss.dtype) - target.to(loss.dtype)
    slope = difference.sign() if eta == 1 else 2 * difference
    shape = (-1, *(1 for _ in prediction.shape[1:]))
    gradient = slope * (scale.to(loss.dtype).reshape(shape) / max(prediction[:1].numel(), 1))
    return loss, gradient.to(prediction.dtype), (-gradient).to(target.dtype) if to_target else None


def _is_fused(prediction: Tensor, impl: str) -> bool:
    return tuning.pointwise("l1_reconstruction_loss", prediction.dtype, prediction.device, impl)


@torch.library.custom_op("fastbegan::l1_reconstruction_loss", mutates_args=())
def _l1_reconstruction_loss(prediction: Tensor, target: Tensor, eta: int, impl: str) -> Tensor:
    if not _is_fused(prediction, impl):
        return reference.l1_reconstruction_loss(prediction, target, eta=eta)
    from .fused import launch

    loss = launch.l1_reconstruction_loss(prediction, target, eta=eta)[0]
    assert loss is not None
    return loss


@_l1_reconstruction_loss.register_fake
def _(prediction: Tensor, target: Tensor, eta: int, impl: str) -> Tensor:
    return prediction.new_empty(prediction.shape[0], dtype=torch.float32)


def _like(tensor: Tensor, prediction: Tensor) -> Tensor:
    """Uninitialised, in the layout that gradients have: channels_last where the prediction is, else contiguous."""
    images = prediction.dim() == 4 and prediction.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if images else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)


@torch.library.custom_op("fastbegan::l1_reconstruction_loss_with_gradients", mutates_args=())
def _with_gradients(
    prediction: Tensor, target: Tensor, scale: Tensor, eta: int, to_target: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    fused = _is_fused(prediction, impl)
    loss, d_prediction, d_target = loss_and_gradients(
        prediction, target, scale, eta=eta, to_target=to_target, fused=fused
    )
    d_prediction = _like(prediction, prediction).copy_(d_prediction) if not fused else d_prediction
    if d_target is None:
        return loss, d_prediction, target.new_empty(0)
    return loss, d_prediction, d_target if fused else _like(target, prediction).copy_(d_target)


@_with_gradients.register_fake
def _(
    prediction: Tensor, target: Tensor, scale: Tensor, eta: int, to_target: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    d_target = _like(target, prediction) if to_target else target.new_empty(0)
    loss = prediction.new_empty(prediction.shape[0], dtype=torch.float32)
    return loss, _like(prediction, prediction), d_target


@torch.library.custom_op("fastbegan::l1_reconstruction_loss_backward", mutates_args=())
def _l1_reconstruction_loss_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, eta: int, to_target: bool, impl: str
) -> tuple[Tensor, Tensor]:
    if _is_fused(prediction, impl):
        from .fused import launch

        _, d_prediction, d_target = launch.l1_reconstruction_loss(
            prediction, target, grad, eta=eta, loss=False, to_target=to_target
        )
        assert d_prediction is not None
        return d_prediction, target.new_empty(0) if d_target is None else d_target
    return _with_gradients(prediction, target, grad, eta, to_target, "algebraic")[1:]


@_l1_reconstruction_loss_backward.register_fake
def _(grad: Tensor, prediction: Tensor, target: Tensor, eta: int, to_target: bool, impl: str) -> tuple[Tensor, Tensor]:
    return _like(prediction, prediction), _like(target, prediction) if to_target else target.new_empty(0)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    prediction, target, ctx.eta, ctx.impl = inputs
    ctx.save_for_backward(prediction, target)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    prediction, target = ctx.saved_tensors
    if torch.is_grad_enabled():
        plain = functools.partial(reference.l1_reconstruction_loss, eta=ctx.eta)
        return (*recorded_gradients(plain, (prediction, target), ctx.needs_input_grad[:2], grad), None, None)
    to_target = ctx.needs_input_grad[1]
    d_prediction, d_target = _l1_reconstruction_loss_backward(
        grad, prediction, target, ctx.eta, to_target, ctx.impl
    )  # fmt: skip
    return d_prediction if ctx.needs_input_grad[0] else None, d_target if to_target else None, None, None


_l1_reconstruction_loss.register_autograd(_backward, setup_context=_setup)
