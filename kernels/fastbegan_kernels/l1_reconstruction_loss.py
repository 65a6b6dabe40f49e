"""l1_reconstruction_loss: the pixel-wise loss of an auto-encoder, one number per sample."""

from __future__ import annotations

import functools
import itertools

import torch
from torch import Tensor

from . import arguments, problems, reference, tuning
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
    """Compute the reconstruction loss of each sample: mean of `|target - prediction|^eta` (paper §3.1).

    The kernel reads each input once forward. In the backward it reads each input once more and writes the gradients.
    Sums are added in a fixed order, so results repeat bit for bit. Where the loss's factor is known beforehand,
    `l1_reconstruction_loss_with_gradients` needs one pass for both. `reference.l1_reconstruction_loss` is the plain
    twin.

    Gradients reach both arguments; the derivative of `|d|` at 0 is 0. With create_graph=True they come from plain
    operations, so they can be differentiated again.

    Args:
        prediction: Reconstructions [N, ...] in any floating-point dtype, for images in [-1, 1].
        target: Targets of the same shape; another dtype is computed in plain operations.
        eta: 1 or 2.
        detach_target: Keep gradients from `target`.
        impl: "reference", "algebraic" or "fused" forces a tier. None takes FASTBEGAN_IMPL from the environment, else
            the kernel if it is verified on this machine.

    Returns:
        Losses [N] in float32 (float64 for float64 inputs), accumulated in that dtype.

    Raises:
        ValueError: Another eta, integer dtypes, or shapes that differ.
        RuntimeError: The fused tier is forced where it cannot run: no GPU, no Triton or float64.
    """
    arguments.check_loss(prediction, target, eta)
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
    """Compute the losses and, in the same pass, the gradients of sum(scale * losses).

    `losses[n]` is the mean of `|target[n] - prediction[n]|^eta`, as in `l1_reconstruction_loss` (paper §3.1).
    `scale` is read on the device, so BEGAN's k never visits the host.

    Autograd records nothing here. Pass the gradients on with torch.autograd.backward(prediction, gradient).

    Args:
        prediction: Reconstructions [N, ...] in any floating-point dtype.
        target: Targets of the same shape; another dtype is computed in plain operations.
        scale: Factors of the losses, [N] or one number, on the same device.
        eta: 1 or 2.
        to_target: Also compute the gradient to `target`.
        impl: "reference", "algebraic" or "fused" forces a tier. None takes FASTBEGAN_IMPL from the environment, else
            the kernel if it is verified on this machine.

    Returns:
        Losses [N] in float32 (float64 for float64 inputs); the gradient to `prediction` in its shape and dtype; the
        gradient to `target` likewise, or None without `to_target`. The kernel writes gradients channels_last where
        `prediction` is, else contiguous.

    Raises:
        ValueError: Another eta, integer dtypes, shapes that differ, or a `scale` of another size.
        RuntimeError: The fused tier is forced where it cannot run: no GPU, no Triton or float64.
    """
    arguments.check_loss(prediction, target, eta)
    if scale.numel() != 1 and scale.shape != (len(prediction),):
        raise ValueError(f"scale is {list(scale.shape)}; accepted: one number or [{len(prediction)}]")
    mode = op_impl(impl, (prediction, target))
    if mode is None or prediction.dtype != target.dtype:
        return _loss_and_gradients(prediction, target, scale, eta=eta, to_target=to_target, fused=False)
    loss, d_prediction, d_target = _with_gradients(prediction, target, scale, eta, to_target, mode)
    return loss, d_prediction, d_target if to_target else None


@torch.no_grad()
def _loss_and_gradients(
    prediction: Tensor, target: Tensor, scale: Tensor, *, eta: int, to_target: bool, fused: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    if fused:
        from .fused import l1_reconstruction_loss as kernel

        loss, d_prediction, d_target = kernel.l1_reconstruction_loss(
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
    return tuning.is_fused("l1_reconstruction_loss", prediction.dtype, prediction.device, impl)


@torch.library.custom_op("fastbegan::l1_reconstruction_loss", mutates_args=())
def _l1_reconstruction_loss(prediction: Tensor, target: Tensor, eta: int, impl: str) -> Tensor:
    if not _is_fused(prediction, impl):
        return reference.l1_reconstruction_loss(prediction, target, eta=eta)
    from .fused import l1_reconstruction_loss as kernel

    loss = kernel.l1_reconstruction_loss(prediction, target, eta=eta)[0]
    assert loss is not None
    return loss


@_l1_reconstruction_loss.register_fake
def _(prediction: Tensor, target: Tensor, eta: int, impl: str) -> Tensor:
    return prediction.new_empty(prediction.shape[0], dtype=torch.float32)


def _empty_gradient(tensor: Tensor, prediction: Tensor) -> Tensor:
    """An empty gradient of `tensor`: channels_last where the prediction is, else contiguous."""
    images = prediction.dim() == 4 and prediction.is_contiguous(memory_format=torch.channels_last)
    layout = torch.channels_last if images else torch.contiguous_format
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device, memory_format=layout)


@torch.library.custom_op("fastbegan::l1_reconstruction_loss_with_gradients", mutates_args=())
def _with_gradients(
    prediction: Tensor, target: Tensor, scale: Tensor, eta: int, to_target: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    fused = _is_fused(prediction, impl)
    loss, d_prediction, d_target = _loss_and_gradients(
        prediction, target, scale, eta=eta, to_target=to_target, fused=fused
    )
    d_prediction = _empty_gradient(prediction, prediction).copy_(d_prediction) if not fused else d_prediction
    if d_target is None:
        return loss, d_prediction, target.new_empty(0)
    return loss, d_prediction, d_target if fused else _empty_gradient(target, prediction).copy_(d_target)


@_with_gradients.register_fake
def _(
    prediction: Tensor, target: Tensor, scale: Tensor, eta: int, to_target: bool, impl: str
) -> tuple[Tensor, Tensor, Tensor]:
    d_target = _empty_gradient(target, prediction) if to_target else target.new_empty(0)
    loss = prediction.new_empty(prediction.shape[0], dtype=torch.float32)
    return loss, _empty_gradient(prediction, prediction), d_target


@torch.library.custom_op("fastbegan::l1_reconstruction_loss_backward", mutates_args=())
def _l1_reconstruction_loss_backward(
    grad: Tensor, prediction: Tensor, target: Tensor, eta: int, to_target: bool, impl: str
) -> tuple[Tensor, Tensor]:
    if _is_fused(prediction, impl):
        from .fused import l1_reconstruction_loss as kernel

        _, d_prediction, d_target = kernel.l1_reconstruction_loss(
            prediction, target, grad, eta=eta, loss=False, to_target=to_target
        )
        assert d_prediction is not None
        return d_prediction, target.new_empty(0) if d_target is None else d_target
    return _with_gradients(prediction, target, grad, eta, to_target, "algebraic")[1:]


@_l1_reconstruction_loss_backward.register_fake
def _(grad: Tensor, prediction: Tensor, target: Tensor, eta: int, to_target: bool, impl: str) -> tuple[Tensor, Tensor]:
    return _empty_gradient(prediction, prediction), _empty_gradient(
        target, prediction
    ) if to_target else target.new_empty(0)


def _setup(ctx, inputs: tuple, output: Tensor) -> None:
    prediction, target, ctx.eta, ctx.impl = inputs
    ctx.save_for_backward(prediction, target)


def _backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
    prediction, target = ctx.saved_tensors
    if torch.is_grad_enabled():
        plain = functools.partial(reference.l1_reconstruction_loss, eta=ctx.eta)
        return (*recorded_gradients(plain, (prediction, target), ctx.needs_input_grad[:2], grad), None, None)
    to_target = ctx.needs_input_grad[1]
    d_prediction, d_target = _l1_reconstruction_loss_backward(grad, prediction, target, ctx.eta, to_target, ctx.impl)
    return d_prediction if ctx.needs_input_grad[0] else None, d_target if to_target else None, None, None


_l1_reconstruction_loss.register_autograd(_backward, setup_context=_setup)


@problems.checks("l1_reconstruction_loss")
def _check(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    """Loss and gradients in one pass, and each alone, as autograd computes them."""
    results: list[Tensor | None] = []
    for shape, eta in itertools.product(problems.SHAPES, (1, 2)):
        prediction, target = (problems.draw(device, dtype, seed, *shape) for seed in (0, 1))
        scale = torch.tensor([1.0, -0.5, 0.25][: shape[0]], device=device)
        both = _loss_and_gradients(prediction, target, scale, eta=eta, to_target=True, fused=fused)
        results += both
        if fused:
            from .fused import l1_reconstruction_loss as kernel

            results.append(kernel.l1_reconstruction_loss(prediction, target, eta=eta)[0])
            results += kernel.l1_reconstruction_loss(prediction, target, scale, eta=eta, loss=False)[1:2]
        else:
            results += both[:2]
    return [value for value in results if value is not None]
