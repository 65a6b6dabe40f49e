"""Training images nearest to generated ones, by their pixels: does the generator repeat what it was shown?"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from ..data.prepare import Progress

_CHUNK_BYTES = 1 << 26  # of training images as float32 at a time
_MEASURED, _MEASURED_BYTES = 200, 1 << 27  # training images that are compared with all others, at most; as float32
_SPARE = 8  # candidates beyond those wanted: float32 sums of squares may swap neighbours that are equally far


@dataclass(frozen=True)
class Neighbour:
    """One training image as seen from a query: its number, and whether it is nearer mirrored.

    `distance` is the root mean square difference of the pixel values, which go from 0 to 255.
    """

    number: int
    distance: float
    mirrored: bool


def nearest(
    queries: np.ndarray,
    images: np.ndarray,
    count: int,
    *,
    flip: bool,
    own: np.ndarray | None = None,
    device: torch.device | str = "cpu",
    progress: Progress = lambda what, done, total: None,
) -> list[list[Neighbour]]:
    """The `count` images nearest to each query, nearest first; fewer where there are fewer.

    `queries` is uint8 [Q, size, size, 3]; `images` is uint8 [N, stored, stored, 3], which may be a memory map and is
    read once, in parts; of larger ones the middle counts. With `flip` an image is as near as the nearer of it and its
    mirror image. `own` int64 [Q] names the image that is not to be found for a query, -1 for none. Raises ValueError
    for images smaller than the queries.
    """
    middle = _middle(images, queries.shape[1])
    excluded = torch.full((len(queries),), -1) if own is None else torch.from_numpy(own)
    seen = np.concatenate([queries, queries[:, :, ::-1]]) if flip else queries  # mirrored q to x: q to mirrored x
    points = _points(seen, device)
    keep = count + _SPARE
    best = torch.empty(len(queries), 0, device=device)
    numbers = torch.empty(len(queries), 0, dtype=torch.int64, device=device)
    rows = max(1, _CHUNK_BYTES // (4 * points.shape[1]))
    for first in range(0, len(images), rows):
        chunk = _points(middle[first : first + rows], device)
        # |q - x|^2 without |q|^2, which is the same for all x and for q mirrored
        scores = torch.addmm(chunk.square().sum(1)[None], points, chunk.T, alpha=-2)
        scores = scores.view(-1, len(queries), len(chunk)).amin(0)
        mine = (excluded >= first) & (excluded < first + len(chunk))
        scores[mine.to(device), (excluded[mine] - first).to(device)] = torch.inf
        found = torch.arange(first, first + len(chunk), device=device).expand_as(scores)
        best, numbers = torch.cat([best, scores], 1), torch.cat([numbers, found], 1)
        best, places = best.topk(min(keep, best.shape[1]), largest=False)
        numbers = numbers.gather(1, places)
        progress("comparing with training images", first + len(chunk), len(images))
    candidates = [row[kept].tolist() for row, kept in zip(numbers.cpu(), best.isfinite().cpu(), strict=True)]
    return [_ranked(q, middle, c, flip)[:count] for q, c in zip(queries, candidates, strict=True)]


@dataclass(frozen=True)
class Comparison:
    """Generated images, a row of neighbours for each, and medians of distances to the first neighbour."""

    rows: list[list[Neighbour]]
    pictures: list[list[np.ndarray]]
    """Of each row the generated image and its neighbours as they were compared, uint8 [size, size, 3]."""
    total: int
    """Training images."""
    measured: int
    """How many of them `between_training` is of."""
    to_training: float | None
    """From a generated image to a training image."""
    between_training: float | None
    """From a training image to another one; None where there is but one."""


def compare(
    samples: np.ndarray,
    images: np.ndarray,
    count: int,
    *,
    flip: bool,
    seed: int,
    device: torch.device | str = "cpu",
    progress: Progress = lambda what, done, total: None,
) -> Comparison:
    """Neighbours of the samples, and beside them how near up to 200 training images, drawn with `seed`, have theirs.

    Arrays and errors are those of `nearest`; `images` is read once.
    """
    size, total = samples.shape[1], len(images)
    middle = _middle(images, size)
    measured = min(total, _MEASURED, max(1, _MEASURED_BYTES // (12 * size**2)))
    own = np.sort(np.random.default_rng(seed).choice(total, measured, replace=False))
    queries = np.concatenate([samples, middle[own]])
    own = np.concatenate([np.full(len(samples), -1), own])
    found = nearest(queries, images, count, flip=flip, own=own, device=device, progress=progress)
    rows, others = found[: len(samples)], found[len(samples) :]
    pictures = [
        [sample, *(middle[one.number, :, :: -1 if one.mirrored else 1] for one in row)]
        for sample, row in zip(samples, rows, strict=True)
    ]
    return Comparison(rows, pictures, total, measured, _typical(rows), _typical(others))


def _typical(rows: list[list[Neighbour]]) -> float | None:
    first = [row[0].distance for row in rows if row]
    return float(np.median(first)) if first else None


def _middle(images: np.ndarray, size: int) -> np.ndarray:
    margin = (images.shape[1] - size) // 2
    if margin < 0:
        raise ValueError(f"images are {images.shape[1]} px; queries of {size} px need at least as many")
    return images[:, margin : margin + size, margin : margin + size]


def _points(images: np.ndarray, device: torch.device | str) -> torch.Tensor:
    """uint8 [N, H, W, 3] -> float32 [N, H * W * 3] around 0, where sums of squares lose the fewest digits."""
    return torch.from_numpy(np.array(images)).to(device).flatten(1).float().sub_(127.5)


def _ranked(query: np.ndarray, images: np.ndarray, numbers: list[int], flip: bool) -> list[Neighbour]:
    """The candidates by their exact distance."""
    found = []
    for number in numbers:
        difference = images[number].astype(np.int32) - query
        straight = float(np.sqrt(np.mean(np.square(difference))))
        if flip:
            difference = images[number, :, ::-1].astype(np.int32) - query
            turned = float(np.sqrt(np.mean(np.square(difference))))
        else:
            turned = straight
        found.append(Neighbour(number, min(straight, turned), turned < straight))
    return sorted(found, key=lambda one: (one.distance, one.number))
