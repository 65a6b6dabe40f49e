"""Which chains are faster than what they replace, by device.

On a CPU a fixed rule decides, which `bench/bench_accelerate.py` holds. An up-convolution pays from about 256 pixels of
its input for each thread, more for few or many channels. A convolution to an image pays in channels_last. All else is
as fast in torch's own operations. On a GPU both ways are raced once (`replacement`).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from fastbegan_kernels.dispatch import allows_tf32
from fastbegan_kernels.replacement import Replacement, pays

from .chains import Chain, example

_LEAST = 256
_FEW_PIXELS, _FEW_VALUES = 1 << 10, 1 << 18


def least_pixels(inputs: int, outputs: int, dtype: torch.dtype) -> int:
    """The number N * H * W of input pixels from which an up-convolution on a CPU is faster.

    Below 64 channels the products no longer fill the processor. Above 256 folding the weights takes longer. More
    threads, and bfloat16, hasten the products, but neither folding nor calls.
    """
    least = _LEAST * (4 if dtype == torch.bfloat16 else 1)
    narrow = min(inputs, outputs, 64)
    return torch.get_num_threads() * max(least, (least * 64 * 64) // narrow**2, inputs, outputs)


def why_left(chain: Chain, channels_last: bool) -> str | None:
    """Why a chain of one layer would not be faster; None if it is."""
    x = example(chain.x)
    if x is None or x.device.type not in ("cpu", "cuda"):
        return f"it runs on {'nothing known' if x is None else x.device.type}; fast layers run on cpu and cuda"
    return _on_gpu(chain, x, channels_last) if x.device.type == "cuda" else _on_cpu(chain, x, channels_last)


def _on_gpu(chain: Chain, x: Tensor, channels_last: bool) -> str | None:
    value = example(chain.value)
    assert value is not None
    weight = None if chain.weights[0] is None else example(chain.weights[0])
    problem = Replacement(
        kind=chain.kinds[0],
        activation=chain.activations[0],
        dtype=str(value.dtype).removeprefix("torch."),  # autocast's, where it is on
        x=tuple(map(_hint, x.shape)),
        weight=() if chain.kinds == ["norm"] or weight is None else tuple(map(_hint, weight.shape)),
        bias=chain.biases[0] is not None,
        alpha=1.0 if chain.alpha is None else chain.alpha,
        channels_last=channels_last,
        backward=value.requires_grad,
        groups=chain.groups,
        eps=chain.eps or 1e-5,
        tf32=value.dtype == torch.float32 and allows_tf32(),
    )
    return None if pays(problem, x.device) else "the layers as they are were measured to be faster on this GPU"


def _on_cpu(chain: Chain, x: Tensor, channels_last: bool) -> str | None:
    if chain.kinds == ["norm"]:
        return "torch's own GroupNorm is as fast on a CPU"
    weight = example(chain.weights[0]) if chain.weights[0] is not None else None
    assert weight is not None
    pixels = _hint(x.shape[0]) * _hint(x.shape[2]) * _hint(x.shape[3])
    outputs, inputs = _hint(weight.shape[0]), _hint(weight.shape[1])
    value = example(chain.value)
    dtype = x.dtype if value is None else value.dtype  # autocast's, where it is on
    if dtype == torch.float16:
        return "in float16 a CPU is slower so"
    if chain.kinds == ["up"]:
        least = least_pixels(inputs, outputs, dtype)
        words = f"its input has {pixels} pixels, and {inputs} -> {outputs} channels are faster from {least} on a CPU"
        return None if pixels >= least else words
    if chain.kinds == ["same"] and to_few(chain):
        if not channels_last:
            return "a convolution to few channels is faster in channels_last only, on a CPU"
        enough = pixels >= _FEW_PIXELS and pixels * inputs >= _FEW_VALUES
        return None if enough else f"its input has too few values to be faster on a CPU ({pixels} x {inputs})"
    return "torch's own convolution is as fast on a CPU"


def pays_by_itself(chain: Chain) -> bool:
    """Whether a convolution without neighbours may be taken: one to an image, on a CPU."""
    x = example(chain.x)
    return x is not None and x.device.type == "cpu" and to_few(chain)


def to_few(chain: Chain) -> bool:
    """Whether the chain is a 3x3 convolution to an image, for which a CPU has another way (`library`)."""
    weight = example(chain.weights[0]) if chain.weights[0] is not None else None
    if chain.kinds != ["same"] or chain.paddings != [1] or weight is None or weight.dtype != torch.float32:
        return False
    return 3 * _hint(weight.shape[0]) <= 16 < _hint(weight.shape[1])


def _hint(size: Any) -> int:
    """A size; of one that may change, that of the call that is followed."""
    return size if isinstance(size, int) else int(size.node.hint)


def least_at_run_time(chain: Chain) -> int:
    """The fewest pixels with which a chain is worth it, for graphs whose sizes may change; 0 for any."""
    x = example(chain.x)
    if x is None or x.device.type != "cpu" or all(isinstance(size, int) for size in x.shape) or chain.kinds[0] != "up":
        return 0
    weight = example(chain.weights[0]) if isinstance(chain.weights[0], fx.Node) else None
    return 0 if weight is None else least_pixels(_hint(weight.shape[1]), _hint(weight.shape[0]), x.dtype)
