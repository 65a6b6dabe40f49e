"""Gradients that can be differentiated again, for create_graph=True (WGAN-GP, R1)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def recorded_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Of `function`, in plain operations that autograd records: its output is computed again from `inputs`.

    Gradients of inputs that `needs` does not name are None.
    """
    # one input may be given twice, or be made of another; a view would give sizes of one other strides
    leaves = [torch.ops.aten.alias(value) for value in inputs]
    output = function(*leaves)
    wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(gradients) if needed else None for needed in needs]
