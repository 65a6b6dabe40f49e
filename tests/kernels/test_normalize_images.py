"""uint8 sets to batches."""

from __future__ import annotations

import torch

from fastbegan_kernels import normalize_images


def test_picks_flips_and_scales() -> None:
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    images[0, 0, 0] = torch.tensor([0, 128, 255])
    index, flip = torch.tensor([1, 0, 0]), torch.tensor([False, True, False])
    batch = normalize_images(images, index, flip)
    assert batch.shape == (3, 3, 4, 4) and batch.is_contiguous(memory_format=torch.channels_last)
    assert batch[2, :, 0, 0].tolist() == [-1.0, torch.tensor(128.0).div(127.5).sub(1).item(), 1.0]
    torch.testing.assert_close(batch[1], batch[2].flip(2), rtol=0, atol=0)
    torch.testing.assert_close(batch[0], images[1].permute(2, 0, 1) / 127.5 - 1)


def test_dtype() -> None:
    assert normalize_images(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), dtype=torch.bfloat16).dtype == torch.bfloat16
