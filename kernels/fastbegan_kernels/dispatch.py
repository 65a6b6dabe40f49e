"""Which implementation of an op runs: the argument, then FASTBEGAN_IMPL, then the best that is known to be right."""

from __future__ import annotations

import os

import torch
from torch import Tensor

IMPLS = ("reference", "algebraic", "fused")


def choose(impl: str | None) -> str:
    """Resolve `impl` to one of IMPLS. Raises ValueError for anything else, naming where it came from.

    Without a choice the algebraic tier runs: no fused kernel has been verified on a GPU yet.
    """
    source = "impl"
    if impl is None:
        impl, source = os.environ.get("FASTBEGAN_IMPL") or "algebraic", "FASTBEGAN_IMPL"
    if impl not in IMPLS:
        raise ValueError(f"{source} is {impl!r}; accepted: {', '.join(IMPLS)}")
    return impl


def require_fused(*tensors: Tensor | None) -> None:
    """Raises RuntimeError where the Triton kernels cannot run on these tensors, and says why."""
    given = [tensor for tensor in tensors if tensor is not None]
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for tensor in given:
        if not (tensor.is_cuda or interpreted):
            raise RuntimeError(f"impl 'fused' needs a GPU; tensor is on {tensor.device} (use 'algebraic')")
        if tensor.dtype == torch.float64:
            raise RuntimeError("impl 'fused' takes float32, bfloat16 and float16; tensor is float64 (use 'algebraic')")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors cast to autocast's dtype where autocast is on for their device, else as they are."""
    device = tensors[0].device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        return tuple(tensor.to(torch.get_autocast_dtype(device)) for tensor in tensors)
    return tensors
