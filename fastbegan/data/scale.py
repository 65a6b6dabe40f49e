"""Pictures scaled to one size, with antialias."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate


def scale(pictures: Sequence[np.ndarray], size: int) -> np.ndarray:
    """Scale uint8 pictures [rows, columns, 3] to uint8 [N, size, size, 3], as Pillow's bilinear to a grey level."""
    scaled = np.empty((len(pictures), size, size, 3), np.uint8)
    shapes: dict[tuple[int, ...], list[int]] = {}
    for number, picture in enumerate(pictures):
        shapes.setdefault(picture.shape, []).append(number)
    for shape, numbers in shapes.items():  # pictures of one shape form one batch
        if shape == (size, size, 3):
            scaled[numbers] = [pictures[number] for number in numbers]
            continue
        group = [pictures[number] for number in numbers]
        in_place = len(group) == 1 and group[0].flags.writeable  # torch warns about read-only arrays
        batch = torch.from_numpy(group[0][None] if in_place else np.stack(group)).permute(0, 3, 1, 2)
        images = interpolate(batch, size=(size, size), mode="bilinear", antialias=True)
        scaled[numbers] = images.permute(0, 2, 3, 1).numpy()
    return scaled
