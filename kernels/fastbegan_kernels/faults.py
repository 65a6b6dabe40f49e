"""What an error says of a kernel: of some it is the cause, of others only the victim."""

from __future__ import annotations

import torch

_NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "cudaerrormemoryallocation")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory was wanting, of the host or of a device, in the words of torch, Triton, cuBLAS or cuDNN."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def is_cuda_error(error: BaseException) -> bool:
    """Whether a kernel broke its device's context, in torch's words or Triton's; nothing runs there any more."""
    accelerator = getattr(torch, "AcceleratorError", ())  # since torch 2.8
    broken = isinstance(error, accelerator) or "CUDA error" in str(error) or "Error [CUDA]" in str(error)
    return broken and not is_out_of_memory(error)


def is_failed_search(error: BaseException) -> bool:
    """Whether cuDNN's search came to nothing: it passes over algorithms for which memory is wanting, maybe over all."""
    return is_out_of_memory(error) or "unable to find an engine" in str(error)


def is_of_the_kernel(error: BaseException) -> bool:
    """Whether another try would end the same on this kind of machine: the kernel broke it, or does not fit onto it."""
    return is_cuda_error(error) or type(error).__name__ == "OutOfResources"  # Triton's: too much shared memory


def in_short(error: BaseException) -> str:
    """Type and message in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
