"""uint8 sets to batches."""

from __future__ import annotations

import pytest
import torch

from fastbegan_kernels import normalize_images

pytestmark = pytest.mark.core


def test_picks_flips_and_scales() -> None:
    images = torch.arange(2 * 4 * 4 * 3, dtype=torch.uint8).view(2, 4, 4, 3)
    images[0, 0, 0] = torch.tensor([0, 128, 255])
    index, flip = torch.tensor([1, 0, 0]), torch.tensor([False, True, False])
    batch = normalize_images(images, index, flip)
    assert batch.shape == (3, 3, 4, 4) and batch.is_contiguous(memory_format=torch.channels_last)
    assert batch[2, :, 0, 0].tolist() == [-1.0, torch.tensor(128.0).div(127.5).sub(1).item(), 1.0]
    torch.testing.assert_close(batch[1], batch[2].flip(2), rtol=0, atol=0)
    torch.testing.assert_close(batch[0], images[1].permute(2, 0, 1) / 127.5 - 1)


def test_windows() -> None:
    images = torch.randint(0, 256, (3, 6, 5, 3), dtype=torch.uint8)
    corner, flip = torch.tensor([[0, 2], [2, 0], [1, 1]]), torch.tensor([False, False, True])
    whole = normalize_images(images)
    batch = normalize_images(images, None, flip, corner, margin=2)
    assert batch.shape == (3, 3, 4, 3) and batch.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(batch[0], whole[0, :, 0:4, 2:5]) and torch.equal(batch[1], whole[1, :, 2:6, 0:3])
    assert torch.equal(batch[2], whole[2, :, 1:5, 1:4].flip(2))
    assert torch.equal(normalize_images(images, margin=2), whole[:, :, 1:5, 1:4])


def test_dtype() -> None:
    assert normalize_images(torch.zeros(1, 2, 2, 3, dtype=torch.uint8), dtype=torch.bfloat16).dtype == torch.bfloat16
