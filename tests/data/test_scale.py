"""Scaling is PIL's antialiased bilinear filter, whatever the shapes."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from fastbegan.data.scale import scale


@pytest.mark.parametrize("size", [1, 8, 33, 64])
def test_as_pil_to_within_one_level(size: int) -> None:
    generator = np.random.default_rng(0)
    shapes = [(40, 50), (33, 33), (7, 90), (40, 50), (64, 64), (8, 8)]
    pictures = [generator.integers(0, 256, (*shape, 3), np.uint8) for shape in shapes]
    found = scale(pictures, size)
    assert found.shape == (6, size, size, 3) and found.dtype == np.uint8
    for picture, got in zip(pictures, found, strict=True):
        exact = np.asarray(Image.fromarray(picture).resize((size, size), Image.Resampling.BILINEAR))
        assert np.abs(got.astype(int) - exact).max() <= 1
        assert np.array_equal(scale([picture], size)[0], got)  # in company as alone


def test_none_and_views() -> None:
    assert scale([], 8).shape == (0, 8, 8, 3)
    picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    assert np.array_equal(scale([picture[2:18, 3:19]], 8), scale([picture[2:18, 3:19].copy()], 8))
