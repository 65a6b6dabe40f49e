# pyright: reportGeneralTypeIssues=false, reportArgumentType=false, reportCallIssue=false
# (Triton types constexpr parameters as constexpr, not as what one passes, and its range as never iterated)
"""The kernel that makes a batch of stored images, and its launcher."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .memory import as_bytes, dense

_BLOCK = 1024  # values of a program


@triton.jit
def _normalize_images_kernel(  # noqa: PLR0913
    images_ptr,
    index_ptr,
    flip_ptr,
    corner_ptr,
    out_ptr,
    height,
    width,
    margin,
    C: tl.constexpr,
    HAS_INDEX: tl.constexpr,
    HAS_FLIP: tl.constexpr,
    HAS_MARGIN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out[n] = window of images[index[n]] at corner[n], mirrored where flip[n], from 0..255 to -1..1; NHWC in memory.

    height and width are those of the output. Images are `margin` higher and wider.
    """
    values = height * width * C
    stored = values
    blocks = tl.cdiv(values, BLOCK)
    n = (tl.program_id(0) // blocks).to(tl.int64)
    i = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    ok = i < values
    source = tl.load(index_ptr + n) if HAS_INDEX else n
    read = i
    if HAS_FLIP or HAS_MARGIN:
        channel = i % C
        column = (i // C) % width
        row = i // (C * width)
        if HAS_MARGIN:
            if HAS_FLIP:
                column = tl.where(tl.load(flip_ptr + n) != 0, width - 1 - column, column)
            row += tl.load(corner_ptr + 2 * n).to(tl.int32)
            column += tl.load(corner_ptr + 2 * n + 1).to(tl.int32)
            across = width + margin
            stored = (height + margin) * across * C
            read = (row * across + column) * C + channel
        else:  # a choice between two addresses needs fewer registers than one between columns
            mirrored = (row * width + width - 1 - column) * C + channel
            read = tl.where(tl.load(flip_ptr + n) != 0, mirrored, i)
    pixel = tl.load(images_ptr + source * stored + tl.where(ok, read, 0), mask=ok, other=0).to(tl.float32)
    tl.store(out_ptr + n * values + i, (pixel / 127.5 - 1.0).to(out_ptr.dtype.element_ty), mask=ok)


def normalize_images(
    images: Tensor, index: Tensor | None, flip: Tensor | None, corner: Tensor | None, margin: int, dtype: torch.dtype
) -> Tensor:
    """A batch [N, C, H - margin, W - margin] in [-1, 1], channels_last, from uint8 images [M, H, W, C].

    Indices and corners are not checked.
    """
    images = images.contiguous()
    height, width, channels = images.shape[1] - margin, images.shape[2] - margin, images.shape[3]
    count = len(images) if index is None else len(index)
    shape = (count, channels, height, width)
    out = torch.empty(shape, dtype=dtype, device=images.device, memory_format=torch.channels_last)
    values = height * width * channels
    if margin and corner is None:
        corner = torch.full((count, 2), margin // 2, device=images.device)
    if count and values:
        tensors = (images, dense(index), as_bytes(flip), dense(corner), out)
        settings = {"HAS_INDEX": index is not None, "HAS_FLIP": flip is not None, "HAS_MARGIN": margin > 0}
        with torch.cuda.device_of(images):
            _normalize_images_kernel[(count * triton.cdiv(values, _BLOCK),)](
                *tensors, height, width, margin, C=channels, BLOCK=_BLOCK, **settings
            )
    return out
