"""Plots in one style, as PNGs without a display.

matplotlib is imported when a figure is made: that takes half a second, and most commands draw none.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .files import atomic

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


def new_figure(
    *,
    rows: int = 1,
    width: float = 9.0,
    height: float = 6.5,
    ratios: Sequence[float] | None = None,
    share_x: bool = False,
) -> tuple[Figure, list[Axes]]:
    """Make an empty figure with axes below each other.

    Args:
        rows: Number of axes.
        width: Of the figure, in inches.
        height: Of the figure, in inches.
        ratios: Relative heights of the axes; None for equal ones.
        share_x: Whether the axes share their x axis.

    Returns:
        The figure, and its axes from top to bottom.
    """
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    axes = list(figure.subplots(rows, 1, sharex=share_x, height_ratios=ratios, squeeze=False)[:, 0])
    for ax in axes:
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG, atomically."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with atomic(path) as file:
        file.write(buffer.getvalue())
