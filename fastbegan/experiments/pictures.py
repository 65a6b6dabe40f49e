"""Pictures of experiments: panels side by side, rows of tiles with names, plots."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

from ..samples import grid

_GAP, _LABEL = 12, 22


def beside(panels: Sequence[tuple[str, np.ndarray]], columns: int) -> Image.Image:
    """Each panel's images, uint8 [N, H, W, 3], as a grid under its name, next to each other."""
    pictures = [grid(images, columns) for _, images in panels]
    height = max(picture.shape[0] for picture in pictures)
    width = sum(picture.shape[1] for picture in pictures) + _GAP * (len(pictures) + 1)
    sheet = Image.new("RGB", (width, height + _LABEL + _GAP), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(14)
    left = _GAP
    for (name, _), picture in zip(panels, pictures, strict=True):
        draw.text((left, 3), name, fill="black", font=font)
        sheet.paste(Image.fromarray(picture), (left, _LABEL))
        left += picture.shape[1] + _GAP
    return sheet


def plot(*, rows: int = 1, height: float = 3.6, ratios: Sequence[float] = (1,)) -> tuple[Figure, list[Axes]]:
    """An empty figure in the style of all plots here, with axes one above the other."""
    figure = Figure(figsize=(8, height), dpi=110, layout="constrained")
    axes = list(np.ravel(figure.subplots(rows, 1, height_ratios=ratios)))
    for one in axes:
        one.grid(alpha=0.25)
        one.spines[["top", "right"]].set_visible(False)
    return figure, axes
