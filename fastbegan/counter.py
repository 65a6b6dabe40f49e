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
    """Draw 64 random bits per counter.

    Args:
        seed: The run's seed.
        stream: One of the constants above, ORDER to JITTER.
        index: Counters, int64 of any shape.

    Returns:
        int64 of the shape of `index`.
    """
    key = _mix((_mix((seed + _GOLDEN) & _MASK) + (stream + 1) * _GOLDEN) & _MASK)
    x = index * _signed(_GOLDEN) + _signed(key)
    for shift, factor in _ROUNDS:
        x = (x ^ _shift(x, shift)) * _signed(factor)
    return x ^ _shift(x, 31)


def uniform(seed: int, stream: int, index: Tensor) -> Tensor:
    """Draw a number per counter, uniform in [0, 1) and a multiple of 2^-24; arguments as for `bits`.

    Returns float32 of the shape of `index`.
    """
    return _shift(bits(seed, stream, index), 40).float() * 2.0**-24


def permutation(seed: int, stream: int, epoch: int, count: int) -> Tensor:
    """Draw a random order of range(count), another one per `epoch`; `seed` and `stream` as for `bits`.

    Returns int64 [count], on the CPU.
    """
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
    """Choose numbers of range(total) at random.

    Args:
        total: Number of images to choose from.
        count: How many to choose; all where there are fewer.
        seed: Gives the random order, of which the first are taken.
        from_end: Take the last of that order, so that two choices overlap as little as possible.

    Returns:
        int64 [min(count, total)], rising.
    """
    order = permutation(seed, SHEET, 0, total)
    return (order[max(0, total - count) :] if from_end else order[:count]).sort().values.numpy()
