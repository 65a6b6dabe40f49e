"""normalize_images: a stored uint8 set to a training batch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import choose, require_fused


def normalize_images(
    images: Tensor,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Tensor:
    """As `reference.normalize_images`: uint8 [M, H, W, C] -> [N, C, H, W] in [-1, 1], channels_last.

    The fused tier gathers, flips and scales in one launch; it does not check that indices are in range.
    """
    if choose(impl) != "fused":
        return reference.normalize_images(images, index, flip, dtype=dtype)
    require_fused(images, index, flip)
    return _normalize_images(images, index, flip, dtype)


@torch.library.custom_op("fastbegan::normalize_images", mutates_args=())
def _normalize_images(images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    from .fused import launch

    return launch.normalize_images(images, index, flip, dtype)


@_normalize_images.register_fake
def _(images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype) -> Tensor:
    _, height, width, channels = images.shape
    shape = ((images if index is None else index).shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
