"""Pictures of experiments: named panels beside or below each other."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from ..runs.sheets import grid

_GAP, _LABEL = 12, 22  # pixels between panels, and of a name's line

Panels = Sequence[tuple[str, np.ndarray]]
"""A name and images, uint8 [N, H, W, 3], per panel."""


def beside(panels: Panels, *columns: int) -> Image.Image:
    """Draw panels side by side, each a grid of images under its name; `columns` per panel, or one number for all."""
    widths = columns if len(columns) > 1 else columns * len(panels)
    pictures = [grid(images, wide) for (_, images), wide in zip(panels, widths, strict=True)]
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


def below(panels: Panels, columns: int) -> Image.Image:
    """Draw panels below each other, each a grid of images under its name."""
    sheets = [beside([panel], columns) for panel in panels]
    height, width = sum(sheet.height for sheet in sheets), max(sheet.width for sheet in sheets)
    whole, top = Image.new("RGB", (width, height), "white"), 0
    for sheet in sheets:
        whole.paste(sheet, (0, top))
        top += sheet.height
    return whole
