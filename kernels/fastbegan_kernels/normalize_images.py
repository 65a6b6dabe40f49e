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
    corner: Tensor | None = None,
    *,
    margin: int = 0,
    dtype: torch.dtype = torch.float32,
    impl: str | None = None,
) -> Tensor:
    """As `reference.normalize_images`: uint8 [M, H, W, C] -> [N, C, H - margin, W - margin] in [-1, 1], channels_last.

    The fused tier gathers, crops, flips and scales in one launch; it does not check that indices and corners are in
    range.
    """
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images is {images.dtype} {list(images.shape)}; accepted: torch.uint8 [M, H, W, C]")
    for name, given, wanted in (("index", index, torch.int64), ("flip", flip, torch.bool)):
        if given is not None and (given.dim() != 1 or given.dtype != wanted):
            raise ValueError(f"{name} is {given.dtype} {list(given.shape)}; accepted: {wanted} [N]")
    if corner is not None and (corner.dim() != 2 or corner.shape[1] != 2 or corner.dtype != torch.int64):
        raise ValueError(f"corner is {corner.dtype} {list(corner.shape)}; accepted: torch.int64 [N, 2]")
    if not 0 <= margin < min(images.shape[1:3]):
        raise ValueError(f"margin is {margin}; accepted: 0 to below the images' sides, {list(images.shape[1:3])}")
    mode = op_impl(impl, (images,), (torch.uint8,))
    if mode is None:
        return reference.normalize_images(images, index, flip, corner, margin=margin, dtype=dtype)
    return _normalize_images(images, index, flip, corner, margin, dtype, mode)


def normalize(
    images: Tensor, index: Tensor | None, flip: Tensor | None, corner: Tensor | None, margin: int,
    dtype: torch.dtype, fused: bool,
) -> Tensor:  # fmt: skip
    """`normalize_images` in the form that is named."""
    if fused:
        from .fused import launch

        return launch.normalize_images(images, index, flip, corner, margin, dtype)
    return reference.normalize_images(images, index, flip, corner, margin=margin, dtype=dtype)


@torch.library.custom_op("fastbegan::normalize_images", mutates_args=())
def _normalize_images(
    images: Tensor, index: Tensor | None, flip: Tensor | None, corner: Tensor | None, margin: int,
    dtype: torch.dtype, impl: str,
) -> Tensor:  # fmt: skip
    fused = tuning.pointwise("normalize_images", dtype, images.device, impl)
    return normalize(images, index, flip, corner, margin, dtype, fused)


@_normalize_images.register_fake
def _(
    images: Tensor, index: Tensor | None, flip: Tensor | None, corner: Tensor | None, margin: int,
    dtype: torch.dtype, impl: str,
) -> Tensor:  # fmt: skip
    _, height, width, channels = images.shape
    shape = ((images if index is None else index).shape[0], channels, height - margin, width - margin)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
