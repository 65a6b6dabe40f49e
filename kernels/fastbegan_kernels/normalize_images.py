"""normalize_images: a stored uint8 set to a training batch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference
from .dispatch import choose


def normalize_images(
    images: Tensor,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Tensor:
    """As `reference.normalize_images`: uint8 [M, H, W, C] -> [N, C, H, W] in [-1, 1], channels_last."""
    choose(impl)
    return reference.normalize_images(images, index, flip, dtype=dtype)
