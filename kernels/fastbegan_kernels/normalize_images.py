"""normalize_images: a training batch from stored uint8 images."""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from . import problems, reference, tuning
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
    """Gather, crop, mirror and scale stored images: batch[n] = mirror(crop(images[index[n]])) / 127.5 - 1.

    The fused tier is one launch that reads each stored byte once. `reference.normalize_images` is the plain twin. There
    are no gradients: images are integers.

    Args:
        images: Stored images, uint8 [M, H, W, C], channels last in memory.
        index: int64 [N], which images to take and in which order; None takes all M. The fused tier does not check that
            values are in range.
        flip: bool [N], which results to mirror left-right; None mirrors none.
        corner: int64 [N, 2], top and left of each window, 0 to `margin`; None takes margin // 2 for both. The fused
            tier does not check the range.
        margin: Rows and columns by which stored images exceed the result, 0 to below H and W.
        dtype: Floating-point dtype of the result.
        impl: "reference", "algebraic" or "fused" forces a tier. None takes FASTBEGAN_IMPL from the environment, else
            the kernel if it is verified on this machine.

    Returns:
        [N, C, H - margin, W - margin] in `dtype`, values in [-1, 1], channels_last.

    Raises:
        ValueError: Shapes, dtypes or `margin` are not as above.
        RuntimeError: The fused tier is forced where it cannot run: no GPU or no Triton.
    """
    if images.dim() != 4 or images.dtype != torch.uint8:
        raise ValueError(f"images is {images.dtype} {list(images.shape)}; accepted: torch.uint8 [M, H, W, C]")
    for name, values, accepted in (("index", index, torch.int64), ("flip", flip, torch.bool)):
        if values is not None and (values.dim() != 1 or values.dtype != accepted):
            raise ValueError(f"{name} is {values.dtype} {list(values.shape)}; accepted: {accepted} [N]")
    if corner is not None and (corner.dim() != 2 or corner.shape[1] != 2 or corner.dtype != torch.int64):
        raise ValueError(f"corner is {corner.dtype} {list(corner.shape)}; accepted: torch.int64 [N, 2]")
    if not 0 <= margin < min(images.shape[1:3]):
        raise ValueError(f"margin is {margin}; accepted: 0 to below the images' sides, {list(images.shape[1:3])}")
    mode = op_impl(impl, (images,), (torch.uint8,))
    if mode is None:
        return reference.normalize_images(images, index, flip, corner, margin=margin, dtype=dtype)
    return _normalize_images(images, index, flip, corner, margin, dtype, mode)


def _launcher(fused: bool) -> Callable[..., Tensor]:
    """The kernel's launcher, or the plain twin."""
    if fused:
        from .fused import normalize_images as kernel

        return kernel.normalize_images
    return reference.normalize_images


@torch.library.custom_op("fastbegan::normalize_images", mutates_args=())
def _normalize_images(
    images: Tensor,
    index: Tensor | None,
    flip: Tensor | None,
    corner: Tensor | None,
    margin: int,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    fused = tuning.is_fused("normalize_images", dtype, images.device, impl)
    return _launcher(fused)(images, index, flip, corner, margin=margin, dtype=dtype)


@_normalize_images.register_fake
def _(
    images: Tensor,
    index: Tensor | None,
    flip: Tensor | None,
    corner: Tensor | None,
    margin: int,
    dtype: torch.dtype,
    impl: str,
) -> Tensor:
    _, height, width, channels = images.shape
    shape = ((images if index is None else index).shape[0], channels, height - margin, width - margin)
    return torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)


@problems.checks("normalize_images")
def _check(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    images = torch.arange(3 * 7 * 9 * 3, device=device).remainder(256).to(torch.uint8).reshape(3, 7, 9, 3)
    index, flip = torch.tensor([2, 0, 2], device=device), torch.tensor([True, False, False], device=device)
    corner = torch.tensor([[0, 2], [1, 0], [2, 1]], device=device)
    normalize = functools.partial(_launcher(fused), images, dtype=dtype)
    return [
        normalize(index, flip, None, margin=0),
        normalize(index, flip, corner, margin=2),
        normalize(None, None, None, margin=0),
    ]
