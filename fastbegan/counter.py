"""Counter-based random numbers: value i is a function of (seed, stream, i), so a run saves no state of them.

The numbers are the same on any device, for any batch size and any number of ranks. The mixing function is the
finaliser of SplitMix64 (Steele, Lea, Flood 2014).
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))

# one stream per purpose; the numbers must not change: a resumed run has to see the same draws
ORDER, FLIP, Z_D, Z_G, FACES, SHEET, JITTER = range(7)


def _mix(value: int) -> int:
    for shift, factor in _ROUNDS:
        value = ((value ^ (value >> shift)) * factor) & _MASK
    return value ^ (value >> 31)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


def _shift(x: Tensor, bits: int) -> Tensor:
    return (x >> bits) & ((1 << (64 - bits)) - 1)  # masked, since shifts of int64 copy the sign


def bits(seed: int, stream: int, index: Tensor) -> Tensor:
    """64 random bits for each int64 counter in `index`, as int64 of the same shape."""
    key = _mix((_mix((seed + _GOLDEN) & _MASK) + (stream + 1) * _GOLDEN) & _MASK)
    x = index * _signed(_GOLDEN) + _signed(key)
    for shift, factor in _ROUNDS:
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, 31)


def uniform(seed: int, stream: int, index: Tensor) -> Tensor:
    """Uniform float32 in [0, 1), a multiple of 2^-24, for each int64 counter in `index`."""
    return _shift(bits(seed, stream, index), 40).float() * 2.0**-24


def permutation(seed: int, stream: int, epoch: int, count: int) -> Tensor:
    """A random order of range(count), another one each epoch: int64 [count], on the CPU."""
    counters = torch.arange(count, dtype=torch.int64) + (epoch << 40)
    return torch.sort(bits(seed, stream, counters), stable=True).indices


def latents(
    seed: int, stream: int, position: int | Tensor, count: int, width: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Latents of generated images `position` to `position + count - 1` of a run.

    Args:
        seed: The run's seed.
        stream: Z_D, Z_G or SHEET.
        position: A number, or a tensor [] int64 on the device.
        count: Number of images.
        width: Length of a latent vector.
        device: Device of the result.

    Returns:
        float32 [count, width], uniform in [-1, 1).
    """
    counters = torch.arange(count * width, dtype=torch.int64, device=device) + position * width
    return uniform(seed, stream, counters).mul_(2).sub_(1).view(count, width)


def chosen(total: int, count: int, seed: int, *, from_end: bool = False) -> np.ndarray:
    """Choose `count` of `total` places at random: int64, in rising order.

    They are the first of a random order, or with `from_end` its last, so that two choices need not overlap.
    """
    order = permutation(seed, SHEET, 0, total)
    return (order[max(0, total - count) :] if from_end else order[:count]).sort().values.numpy()
