"""Curves of a run as a PNG."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..files import atomic

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def save_curves(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """M, both losses and k over images seen, from rows of metrics.jsonl; nothing for no rows."""
    if not rows:
        return
    from matplotlib.figure import Figure  # without pyplot: no global state, no display

    figure = Figure(figsize=(9, 6.5), dpi=110, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(2, 1))
    images = [row["images"] for row in rows]
    marker = "o" if len(rows) == 1 else None
    for name, label, colour in (
        ("convergence", "M", "#222222"),
        ("loss_real", "L(x)", "#1f77b4"),
        ("loss_fake", "L(G(z))", "#d62728"),
    ):
        upper.plot(images, [row[name] for row in rows], label=label, color=colour, linewidth=1.3, marker=marker)
    upper.set_ylabel("mean absolute error, images in [-1, 1]")
    upper.set_ylim(bottom=0)
    upper.legend(frameon=False)
    upper.set_title(title, fontsize=10)
    lower.plot(images, [row["k"] for row in rows], color="#2ca02c", linewidth=1.3, marker=marker)
    lower.set_ylabel("k")
    lower.set_ylim(bottom=0)
    lower.set_xlabel("images seen")
    for axes in (upper, lower):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    save_figure(path, figure)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as a PNG atomically, without a display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    buffer = io.BytesIO()
    FigureCanvasAgg(figure).print_png(buffer)
    with atomic(path) as file:
        file.write(buffer.getvalue())
