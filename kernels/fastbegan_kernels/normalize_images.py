"""normalize_images: a stored uint8 set to a training batch."""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference, tuning
from .dispatch import op_impl


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
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images is {images.dtype} {list(images.shape)}; accepted: torch.uint8 [M, H, W, C]")
    for name, given, wanted in (("index", index, torch.int64), ("flip", flip, torch.bool)):
        if given is not None and (given.dim() != 1 or given.dtype != wanted):
            raise ValueError(f"{name} is {given.dtype} {list(given.shape)}; accepted: {wanted} [N]")
    mode = op_impl(impl, (images,), (torch.uint8,))
    if mode is None:
        return reference.normalize_images(images, index, flip, dtype=dtype)
    return _normalize_images(images, index, flip, dtype, mode)


def normalize(images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype, fused: bool) -> Tensor:
    """`normalize_images` in the form that is named."""
    if fused:
        from .fused import launch

        return launch.normalize_images(images, index, flip, dtype)
    return reference.normalize_images(images, index, flip, dtype=dtype)


@torch.library.custom_op("fastbegan::normalize_images", mutates_args=())
def _normalize_images(
    images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype, impl: str
) -> Tensor:
    fused = tuning.pointwise("normalize_images", dtype, images.device, impl)
    return normalize(images, index, flip, dtype, fused)


@_normalize_images.register_fake
def _(images: Tensor, index: Tensor | None, flip: Tensor | None, dtype: torch.dtype, impl: str) -> Tensor:
    _, height, width, channels = images.shape
    shape = ((images if index is None else index).shape[0], channels, height, width)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
