"""Gradients that can be differentiated again.

Kernels have no second derivative. Under create_graph=True (WGAN-GP, R1) an op therefore computes its gradients from
its plain twin, which autograd records.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def recorded_gradients(
    function: Callable[..., Tensor], inputs: Sequence[Tensor], needs: Sequence[bool], grad: Tensor
) -> list[Tensor | None]:
    """Gradients of `function`, which consists of plain operations, at `inputs`; None where `needs` is False.

    The function runs again, since the op's forward did not record it.
    """
    # aliases are separate leaves even where one tensor comes twice; a view would change the strides of sizes of one
    leaves = [torch.ops.aten.alias(value) for value in inputs]
    output = function(*leaves)
    wanted = [leaf for leaf, needed in zip(leaves, needs, strict=True) if needed]
    gradients = iter(torch.autograd.grad(output, wanted, grad, create_graph=True))
    return [next(gradients) if needed else None for needed in needs]
