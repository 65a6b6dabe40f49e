"""Which implementation of an op is asked for: the argument, then FASTBEGAN_IMPL, then nobody (automatic).

Here only what can be decided without looking at a device, so that torch.compile can trace it. On a GPU the ops then ask
`tuning`, when they run, which form has been verified there and is fastest.
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
"""Whether this torch is for AMD's GPUs, which call themselves cuda, and whose capability reads like an H100's."""


def asked_for(impl: str | None) -> str | None:
    """`impl`, else FASTBEGAN_IMPL, else None; under torch.jit.trace "reference", whose operations can be saved.

    Raises ValueError for what is not in IMPLS, naming where it came from.
    """
    source = "impl"
    if impl is None:
        impl, source = os.environ.get("FASTBEGAN_IMPL") or None, "FASTBEGAN_IMPL"
    if impl is not None and impl not in IMPLS:
        raise ValueError(f"{source} is {impl!r}; accepted: {', '.join(IMPLS)}")
    return "reference" if torch.jit.is_tracing() else impl


def op_impl(impl: str | None, tensors: Sequence[Tensor | None], dtypes: Sequence[torch.dtype] = DTYPES) -> str | None:
    """What to give a `torch.library` op as its `impl` ("auto", "algebraic" or "fused"); None: compose plain operations.

    Composed are the reference tier, and the algebraic one where no kernel can run: on the CPU, without Triton, for
    float64. Raises RuntimeError where "fused" is asked for and cannot run, and says why.
    """
    impl = asked_for(impl)
    if impl == "reference":
        return None
    given = [tensor for tensor in tensors if tensor is not None]
    if impl == "fused":
        _require_fused(given, dtypes)
        return impl
    if HAS_TRITON and not ROCM and all(tensor.is_cuda and tensor.dtype in dtypes for tensor in given):
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
            found = str(tensor.dtype).removeprefix("torch.")
            raise RuntimeError(f"impl 'fused' takes {accepted}; tensor is {found} (use 'algebraic')")


def autocast(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Tensors cast to autocast's dtype where autocast is on for their device, else as they are; float64 stays."""
    device = tensors[0].device.type
    if device in ("cpu", "cuda") and torch.is_autocast_enabled(device):
        wanted = torch.get_autocast_dtype(device)
        return tuple(one if one.dtype == torch.float64 else one.to(wanted) for one in tensors)
    return tensors


def allows_tf32() -> bool:
    """Whether float32 convolutions may round their inputs to TF32: torch's setting, exact where it is off."""
    try:
        return torch.backends.cudnn.allow_tf32
    except RuntimeError:  # set through torch's newer fp32_precision
        return torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore[reportAttributeAccessIssue]
