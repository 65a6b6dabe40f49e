"""skip_phase_table: what a convolution over an upsampled small map gives, computed on the small map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference
from .dispatch import asked_for
from .fold import fold
from .layout import is_channels_last, lay_out


def skip_phase_table(h: Tensor, weight: Tensor, *, impl: str | None = None) -> Tensor:
    """As `reference.skip_phase_table`: h [N, C, S, S] -> [N, 3, 3, S, S, K], in 25 products a pixel instead of 81.

    weight is [K, C, 3, 3], or folded once for many calls (`fold`, kind "skip"), [25 K, C, 1, 1]. Sums of taps that read
    one pixel are taken before multiplying; what belongs to the pixel above or beside is then moved there.
    """
    if asked_for(impl) == "reference" and weight.shape[2] == 3:
        return reference.skip_phase_table(h, weight)
    if weight.shape[2] == 3:
        h = lay_out(h, True) if is_channels_last(weight) else h
        (weight,) = fold([weight], ["skip"], dtype=h.dtype, impl=impl)
        weight = lay_out(weight, False)  # 1x1: its strides would say channels_last, and h's gradient be laid out so
    sums = F.conv2d(h, weight).permute(0, 2, 3, 1).unflatten(3, (5, 5, -1))  # [N, S, S, 5, 5, K]
    return _join(_join(sums, 1, 3), 2, 4).permute(0, 3, 4, 1, 2, 5)


def _join(sums: Tensor, space: int, dim: int) -> Tensor:
    """Five sums of taps along `dim` to the three phases: each to the pixel that it is added to along `space`."""
    before, first, inner, last, behind = sums.unbind(dim)
    size = sums.shape[space]
    edge = torch.zeros_like(inner.narrow(space, 0, 1))
    before = torch.cat((edge, before.narrow(space, 0, size - 1)), space)
    behind = torch.cat((behind.narrow(space, 1, size - 1), edge), space)
    return torch.stack((before + first, inner, last + behind), dim)
