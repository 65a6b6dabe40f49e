"""How samples look beside real images, in two figures that need no other network."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

SHARPNESS = "mean difference of neighbouring pixels, samples over real images"
VARIETY = "mean distance between two samples, over that between two real images"


@dataclass(frozen=True)
class Appearance:
    """Figures of a set of samples against a set of real images."""

    diversity: float
    """Mean absolute difference between two samples, of images in [-1, 1]."""
    sharpness: float
    """`roughness` of the samples over that of the real images: below 1 for blurred samples; textures raise it too."""
    variety: float
    """`diversity` of the samples over that of the real images: near 0 for one image over and over."""


def compare(samples: Tensor, real: Tensor) -> Appearance:
    """Compare samples with real images.

    Args:
        samples: [N, 3, H, W] in [-1, 1] (clipped).
        real: [M, 3, H, W] in [-1, 1].

    Returns:
        Their figures; a ratio to 0 (real images that are all alike, or of one colour) counts as 0.
    """
    spread = diversity(samples)
    return Appearance(spread, _ratio(roughness(samples), roughness(real)), _ratio(spread, diversity(real)))


def _ratio(value: float, of: float) -> float:
    return value / of if of > 0 else 0.0


def diversity(images: Tensor) -> float:
    """Mean absolute difference per value over all pairs of images [N, 3, H, W] in [-1, 1]; 0 for equal images."""
    flat = images.detach().float().clamp(-1, 1).flatten(1)
    count = len(flat)
    if count < 2:
        return 0.0
    return torch.pdist(flat, p=1).mean().item() / flat.shape[1]


def roughness(images: Tensor) -> float:
    """Mean absolute difference of neighbouring pixels, along rows and along columns, of [N, 3, H, W] in [-1, 1]."""
    pixels = images.detach().float().clamp(-1, 1)
    return (pixels.diff(dim=2).abs().mean() + pixels.diff(dim=3).abs().mean()).item()
