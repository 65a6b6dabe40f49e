"""Pictures to one size, with antialias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate


def scale(pictures: Sequence[np.ndarray], size: int) -> np.ndarray:
    """uint8 pictures [rows, columns, 3] -> uint8 [N, size, size, 3]; PIL's bilinear filter to within one grey level."""
    found = np.empty((len(pictures), size, size, 3), np.uint8)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        shapes.setdefault(picture.shape, []).append(number)
    for shape, numbers in shapes.items():  # those of one shape at once
        if shape == (size, size, 3):
            found[numbers] = [pictures[number] for number in numbers]
            continue
        some = [pictures[number] for number in numbers]
        alone = len(some) == 1 and some[0].flags.writeable  # torch takes nothing else as it is
        batch = torch.from_numpy(some[0][None] if alone else np.stack(some)).permute(0, 3, 1, 2)
        scaled = interpolate(batch, size=(size, size), mode="bilinear", antialias=True)
        found[numbers] = scaled.permute(0, 2, 3, 1).numpy()
    return found
