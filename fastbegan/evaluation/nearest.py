"""The training images nearest to generated ones, by their pixels: has the generator memorised them?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..data.prepare import Progress

_CHUNK_BYTES = 1 << 26  # of training images as float32 at a time
_MEASURED, _MEASURED_BYTES = 200, 1 << 27  # at most so many training images, and bytes of float32, are queries too
_SPARE = 8  # extra candidates, since float32 sums of squares may swap neighbours of nearly equal distance


@dataclass(frozen=True)
class Neighbour:
    """A training image near a query."""

    number: int
    distance: float
    """Root mean square difference of the pixel values, which go from 0 to 255."""
    mirrored: bool
    """Whether its mirror image is nearer than itself."""


def nearest(
    queries: np.ndarray,
    images: np.ndarray,
    count: int,
    *,
    flip: bool,
    excluded: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda work, done, total: None,
) -> list[list[Neighbour]]:
    """Find the `count` images nearest to each query, nearest first; fewer where there are fewer images.

    Args:
        queries: uint8 [Q, size, size, 3].
        images: uint8 [N, stored, stored, 3], read once in chunks; a memory map will do. The middle of larger ones
            counts.
        count: Neighbours per query.
        flip: Whether an image counts as near as the nearer of it and its mirror image.
        excluded: int64 [Q], the number of an image that is not a neighbour of this query, -1 for none.
        device: Where distances are computed.
        progress: Called after each chunk.

    Returns:
        A list of neighbours per query.

    Raises:
        ValueError: The images are smaller than the queries.
    """
    middle = _middle(images, queries.shape[1])
    skipped = torch.full((len(queries),), -1) if excluded is None else torch.from_numpy(excluded)
    # mirroring the queries gives the distances to mirrored images, and there are fewer queries
    points = _points(np.concatenate([queries, queries[:, :, ::-1]]) if flip else queries, device)
    keep = count + _SPARE
    best = torch.empty(len(queries), 0, device=device)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    rows = max(1, _CHUNK_BYTES // (4 * points.shape[1]))
    for first in range(0, len(images), rows):
        chunk = _points(middle[first : first + rows], device)
        # |q - x|^2 less |q|^2, which does not depend on x
        scores = torch.addmm(chunk.square().sum(1)[None], points, chunk.T, alpha=-2)
        scores = scores.view(-1, len(queries), len(chunk)).amin(0)
        inside = (skipped >= first) & (skipped < first + len(chunk))
        scores[inside.to(device), (skipped[inside] - first).to(device)] = torch.inf
        here = torch.arange(first, first + len(chunk), device=device).expand_as(scores)
        best, numbers = torch.cat([best, scores], 1), torch.cat([numbers, here], 1)
        best, places = best.topk(min(keep, best.shape[1]), largest=False)
        numbers = numbers.gather(1, places)
        progress("comparing with training images", first + len(chunk), len(images))
    candidates = [row[finite].tolist() for row, finite in zip(numbers.cpu(), best.isfinite().cpu(), strict=True)]
    return [_ranked(q, middle, c, flip)[:count] for q, c in zip(queries, candidates, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """Generated images beside their nearest training images, and a yardstick for the distances."""

    rows: list[list[Neighbour]]
    """The neighbours of each generated image."""
    pictures: list[list[np.ndarray]]
    """Per row, the generated image and its neighbours as they were compared: uint8 [size, size, 3]."""
    total: int
    """Number of training images."""
    measured: int
    """Number of training images behind `between_training`."""
    to_training: float | None
    """Median distance from a generated image to the nearest training image."""
    between_training: float | None
    """Median distance from a training image to the nearest other one; None where there is only one."""


def compare(
    samples: np.ndarray,
    images: np.ndarray,
    count: int,
    *,
    flip: bool,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress = lambda work, done, total: None,
) -> Comparison:
    """Find the neighbours of samples, and for comparison those of up to 200 training images.

    Args:
        samples: Generated images: uint8 [S, size, size, 3].
        images: Training images, as for `nearest`; read once.
        count: Neighbours per sample.
        flip: As for `nearest`.
        seed: Chooses the training images.
        device: As for `nearest`.
        progress: As for `nearest`.

    Raises:
        ValueError: The training images are smaller than the samples.
    """
    size, total = samples.shape[1], len(images)
    middle = _middle(images, size)
    measured = min(total, _MEASURED, max(1, _MEASURED_BYTES // (12 * size**2)))
    chosen = np.sort(np.random.default_rng(seed).choice(total, measured, replace=False))
    queries = np.concatenate([samples, middle[chosen]])
    excluded = np.concatenate([np.full(len(samples), -1), chosen])  # a training image is not its own neighbour
    neighbours = nearest(queries, images, count, flip=flip, excluded=excluded, device=device, progress=progress)
    rows, of_training = neighbours[: len(samples)], neighbours[len(samples) :]
    pictures = [
        [sample, *(middle[neighbour.number, :, :: -1 if neighbour.mirrored else 1] for neighbour in row)]
        for sample, row in zip(samples, rows, strict=True)
    ]
    return Comparison(rows, pictures, total, measured, _median(rows), _median(of_training))


def _median(rows: list[list[Neighbour]]) -> float | None:
    """Median distance to the first neighbour."""
    first = [row[0].distance for row in rows if row]
    return float(np.median(first)) if first else None


def _middle(images: np.ndarray, size: int) -> np.ndarray:
    margin = (images.shape[1] - size) // 2
    if margin < 0:
        raise ValueError(f"images are {images.shape[1]} px; queries of {size} px need at least as many")
    return images[:, margin : margin + size, margin : margin + size]


def _points(images: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """uint8 [N, H, W, 3] as float32 [N, H * W * 3], centred so that sums of squares lose few digits."""
    return torch.from_numpy(np.array(images)).to(device).flatten(1).float().sub_(127.5)


def _ranked(query: np.ndarray, images: np.ndarray, numbers: list[int], flip: bool) -> list[Neighbour]:
    """The candidates as neighbours, sorted by their exact distance."""
    neighbours = []
    for number in numbers:
        difference = images[number].astype(np.int32) - query
        straight = float(np.sqrt(np.mean(np.square(difference))))
        if flip:
            difference = images[number, :, ::-1].astype(np.int32) - query
            turned = float(np.sqrt(np.mean(np.square(difference))))
        else:
            turned = straight
        neighbours.append(Neighbour(number, min(straight, turned), turned < straight))
    return sorted(neighbours, key=lambda neighbour: (neighbour.distance, neighbour.number))
