"""What procedural pictures are drawn with: random traits, a canvas, shapes.

A shape is a signed distance field, negative inside, in units of half the image. The field becomes a coverage per pixel,
so edges are smooth at every size. x grows to the right, y downwards, from -1 to 1.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from .. import counter

_CHUNK = 128  # pictures drawn at once: bounds memory and keeps temporaries in the cache


def in_parts(draw: Callable[[Tensor, int, int], Tensor]) -> Callable[..., Tensor]:
    """Make a style of a function that draws a few pictures.

    Args:
        draw: Takes numbers of pictures (int64 [n]), their height and width in pixels, and a seed, which chooses another
            set of pictures. Returns float [n, size, size, 3] in [0, 1].

    Returns:
        A function of (index, size, seed=0), which draws part by part: uint8 [N, size, size, 3], on index's device.
    """

    @functools.wraps(draw)
    def drawn(index: Tensor, size: int, seed: int = 0) -> Tensor:
        chunks = [draw(part, size, seed).mul(255).round().to(torch.uint8) for part in index.split(_CHUNK)]
        return torch.cat(chunks) if chunks else index.new_zeros((0, size, size, 3), dtype=torch.uint8)

    return drawn


class Traits:
    """The random numbers of N pictures, one draw after another; shape [N, 1, 1] broadcasts over pixels.

    The order of draws is part of what a picture is: a new trait is drawn last, and the style's VERSION is raised.
    """

    PER_IMAGE = 80  # counters reserved for each image

    def __init__(self, index: Tensor, seed: int) -> None:
        counters = index[:, None] * self.PER_IMAGE + torch.arange(self.PER_IMAGE, device=index.device)
        self._draws = iter(counter.uniform(seed, counter.FACES, counters).T[..., None, None])

    def between(self, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * next(self._draws)

    def chance(self, probability: float) -> Tensor:
        """1.0 with this probability, else 0.0."""
        return (next(self._draws) < probability).float()

    def colour(self, palette: tuple[str, ...]) -> Tensor:
        """A colour of the palette per picture, [N, 1, 1, 3], up to 6 % lighter or darker than listed."""
        draw = next(self._draws)
        table = _table(palette, draw.device)
        scaled = draw.flatten() * len(palette)
        chosen = scaled.long().clamp(max=len(palette) - 1)
        jitter = 0.94 + 0.12 * (scaled - chosen)  # the remainder is uniform in [0, 1) again
        return (table[chosen] * jitter[:, None]).clamp(0, 1)[:, None, None]


def blend(palette: tuple[str, ...], place: Tensor) -> Tensor:
    """The colour at `place`, 0 to 1, [N, 1, 1], on the line through the palette's in their order: [N, 1, 1, 3]."""
    table = _table(palette, place.device)
    scaled = place.flatten() * (len(palette) - 1)
    left = scaled.long().clamp(max=len(palette) - 2)
    return torch.lerp(table[left], table[left + 1], (scaled - left)[:, None])[:, None, None]


def _table(palette: tuple[str, ...], device: torch.device) -> Tensor:
    return torch.tensor([[int(c[i : i + 2], 16) / 255 for i in (0, 2, 4)] for c in palette], device=device)


class Canvas:
    """An image under construction, float [N, H, W, 3]."""

    def __init__(self, count: int, size: int, device: torch.device) -> None:
        axis = (torch.arange(size, device=device) + 0.5) / size * 2 - 1
        self.x, self.y = axis[None, None, :], axis[None, :, None]
        self.pixel = 2.0 / size
        self.image = torch.zeros(count, size, size, 3, device=device)

    def cover(self, distance: Tensor) -> Tensor:
        """The share of each pixel that lies inside the shape, 0 to 1."""
        return (0.5 - distance / self.pixel).clamp(0, 1)

    def paint(self, mask: Tensor, colour: Tensor | tuple[float, float, float]) -> None:
        """Blend `colour` into the image by `mask` [N, H, W], 0 to 1."""
        if isinstance(colour, tuple):
            colour = torch.tensor(colour, device=self.image.device)
        self.image.lerp_(colour.expand_as(self.image), mask.expand(self.image.shape[:3])[..., None])


def oval(x: Tensor, y: Tensor, rx: Tensor | float, ry: Tensor | float, power: Tensor | float = 2.0) -> Tensor:
    """Super-ellipse |x/rx|^p + |y/ry|^p = 1, distance scaled by the smaller radius."""
    norm = (x / rx).abs().pow(power) + (y / ry).abs().pow(power)
    radius = torch.minimum(torch.as_tensor(rx), torch.as_tensor(ry))
    return (norm.clamp(min=1e-12).pow(1 / power) - 1) * radius


def bar(x: Tensor, y: Tensor, half_length: Tensor, radius: Tensor | float) -> Tensor:
    """A horizontal bar with round ends."""
    return torch.hypot((x.abs() - half_length).clamp(min=0), y) - radius


def both(a: Tensor, b: Tensor) -> Tensor:
    """The intersection of two shapes."""
    return torch.maximum(a, b)
