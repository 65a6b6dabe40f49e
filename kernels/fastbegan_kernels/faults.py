"""Kinds of errors, told by their type and message.

`tuning` blames a kernel only for errors that the kernel caused. Want of memory and failed searches have other causes.
"""

from __future__ import annotations

import torch

_NO_MEMORY = ("out of memory", "can't allocate memory", "alloc_failed", "cudaerrormemoryallocation")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether host or device memory ran out, as torch, Triton, cuBLAS or cuDNN report it."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error).lower() for words in _NO_MEMORY)


def is_cuda_error(error: BaseException) -> bool:
    """Whether the device's context is broken, as torch or Triton report it. No later kernel runs in this process."""
    accelerator = getattr(torch, "AcceleratorError", ())  # since torch 2.8
    broken = isinstance(error, accelerator) or "CUDA error" in str(error) or "Error [CUDA]" in str(error)
    return broken and not is_out_of_memory(error)


def is_failed_search(error: BaseException) -> bool:
    """Whether cuDNN's search found no algorithm. It skips those that lack memory, which may be all of them."""
    return is_out_of_memory(error) or "unable to find an engine" in str(error)


def is_of_the_kernel(error: BaseException) -> bool:
    """Whether a kernel would fail again on this kind of machine: it broke the context or exceeds the chip's limits."""
    return is_cuda_error(error) or type(error).__name__ == "OutOfResources"  # Triton's: too much shared memory


def in_short(error: BaseException) -> str:
    """Type and message in one line of at most 200 characters."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]
