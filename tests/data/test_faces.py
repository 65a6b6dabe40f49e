"""Procedural portraits: image i is a function of (seed, i), at any size."""

from __future__ import annotations

import pytest
import torch

from fastbegan.data.faces import faces


@pytest.mark.parametrize("size", [8, 32, 33, 64])
def test_an_image_depends_on_its_number_only(size: int) -> None:
    together = faces(torch.arange(140), size, seed=3)
    assert together.shape == (140, size, size, 3) and together.dtype == torch.uint8
    for number in (0, 1, 77, 139):
        assert torch.equal(faces(torch.tensor([number]), size, seed=3)[0], together[number])
    some = torch.tensor([139, 2, 50])
    assert torch.equal(faces(some, size, seed=3), together[some])


def test_images_and_seeds_differ() -> None:
    a, b = faces(torch.arange(64), 32), faces(torch.arange(64), 32, seed=1)
    flat = torch.cat((a, b)).flatten(1).float() / 127.5
    distances = torch.pdist(flat, p=1) / flat.shape[1]
    assert distances.min() > 0.02
    assert distances.mean() > 0.3


def test_the_same_portrait_at_two_sizes() -> None:
    small, large = faces(torch.arange(16), 32).float(), faces(torch.arange(16), 128).float()
    averaged = large.view(16, 32, 4, 32, 4, 3).mean((2, 4))
    assert (small - averaged).abs().mean() < 4


def test_no_images() -> None:
    assert faces(torch.arange(0), 16).shape == (0, 16, 16, 3)
