"""Procedural faces and portraits: image i is a function of (seed, i), at any size."""

from __future__ import annotations

import platform
import zlib
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastbegan.data.faces import faces
from fastbegan.data.portraits import portraits
from fastbegan.data.styles import STYLES, style_of

Draw = Callable[..., Tensor]
EVERY = pytest.mark.parametrize("draw", [faces, portraits])


@EVERY
@pytest.mark.parametrize("size", [8, 32, 33, 64])
def test_an_image_depends_on_its_number_only(draw: Draw, size: int) -> None:
    together = draw(torch.arange(140), size, seed=3)
    assert together.shape == (140, size, size, 3) and together.dtype == torch.uint8
    for number in (0, 1, 77, 139):
        assert torch.equal(draw(torch.tensor([number]), size, seed=3)[0], together[number])
    some = torch.tensor([139, 2, 50])
    assert torch.equal(draw(some, size, seed=3), together[some])


@EVERY
def test_images_and_seeds_differ(draw: Draw) -> None:
    a, b = draw(torch.arange(64), 32), draw(torch.arange(64), 32, seed=1)
    flat = torch.cat((a, b)).flatten(1).float() / 127.5
    distances = torch.pdist(flat, p=1) / flat.shape[1]
    assert distances.min() > 0.02
    assert distances.mean() > 0.2


@EVERY
def test_the_same_image_at_two_sizes(draw: Draw) -> None:
    small, large = draw(torch.arange(16), 32).float(), draw(torch.arange(16), 128).float()
    averaged = large.view(16, 32, 4, 32, 4, 3).mean((2, 4))
    assert (small - averaged).abs().mean() < 4


@EVERY
def test_no_images(draw: Draw) -> None:
    assert draw(torch.arange(0), 16).shape == (0, 16, 16, 3)


def test_walls_and_clothes_vary_little_beside_faces() -> None:
    spread = faces(torch.arange(200), 32).float().std(0).mean(-1)  # [32, 32]
    corner, shirt, face = spread[:4, :3].mean(), spread[-1, 12:20].mean(), spread[10:24, 10:22].mean()
    assert corner < 10 and shirt < 20 and face > 35


@pytest.mark.skipif(platform.machine() != "x86_64", reason="other CPUs may round otherwise")
def test_portraits_are_what_they_were() -> None:
    """Runs on them go on: their checkpoints hold a checksum of all pixels."""
    drawn = portraits(torch.arange(40), 16)
    assert zlib.crc32(drawn.numpy().tobytes()) == 1525566173


@pytest.mark.parametrize(
    ("data", "style"), [("faces", "faces"), ("portraits:9", "portraits"), ("./faces", None), ("faces.zip", None)]
)
def test_names(data: str, style: str | None) -> None:
    assert style_of(data) == style and set(STYLES) == {"faces", "portraits"}
