"""Which implementation of an op runs: the argument `impl`, else FASTBEGAN_IMPL, else an automatic choice.

This module reads devices and dtypes of tensors only, so that torch.compile can trace it. On a GPU, an op then asks
`tuning` at run time for the fastest form that was verified there.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence

import torch
from torch import Tensor

IMPLS = ("reference", "algebraic", "fused")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
HAS_TRITON = importlib.util.find_spec("triton") is not None
ROCM = torch.version.hip is not None
"""Whether this torch is for AMD's GPUs. Their device type is "cuda" too, and their capability reads like an H100's."""


def asked_for(impl: str | None) -> str | None:
    """The tier in `impl`, else in FASTBEGAN_IMPL, else None.

    torch.jit.trace always gets "reference": only torch's own operations can be saved. Raises ValueError for a name
    that is not in IMPLS, with its source.
    """
    source = "impl"
    if impl is None:
        impl, source = os.environ.get("FASTBEGAN_IMPL") or None, "FASTBEGAN_IMPL"
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"{source} is {impl!r}; accepted: {', '.join(IMPLS)}")
    return "reference" if torch.jit.is_tracing() else impl


def op_impl(impl: str | None, tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype] = DTYPES) -> str | None:
    """The `impl` of a `torch.library` op: "auto", "algebraic" or "fused". None: compose plain operations instead.

    The reference tier is composed. The algebraic tier is composed on the CPU, without Triton and for float64, where no
    kernel runs. Raises RuntimeError where "fused" is forced and cannot run, with the reason.
    """
    impl = asked_for(impl)
    if impl == "reference":
        return None
    present = [tensor for tensor in tensors if tensor is not None]
    if impl == "fused":
        _require_fused(present, dtypes)
        return impl
    if HAS_TRITON and not ROCM and all(tensor.is_cuda and tensor.dtype in dtypes for tensor in present):
        return impl or "auto"
    return None


def _require_fused(tensors: Sequence[Tensor], dtypes: Sequence[torch.dtype]) -> None:
    if not HAS_TRITON:
        raise RuntimeError("impl 'fused' needs Triton, which is not installed (use 'algebraic')")
    if ROCM:
        raise RuntimeError("impl 'fused' is for NVIDIA GPUs; this torch is for ROCm (use 'algebraic')")
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    for tensor in tensors:
        if not (tensor.is_cuda or interpreted):
            raise RuntimeError(f"impl 'fused' needs a GPU; tensor is on {tensor.device} (use 'algebraic')")
        if tensor.dtype not in dtypes:
            accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            name = str(tensor.dtype).removeprefix("torch.")
            raise RuntimeError(f"impl 'fused' takes {accepted}; tensor is {name} (use 'algebraic')")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors cast to autocast's dtype where autocast is on for their device. float64 stays."""
    device = tensors[0].device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        return tuple(tensor if tensor.dtype == torch.float64 else tensor.to(dtype) for tensor in tensors)
    return tensors


def allows_tf32() -> bool:
    """Whether torch's settings let float32 convolutions round their inputs to TF32."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set through torch's newer fp32_precision
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
