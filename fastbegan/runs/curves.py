"""Curves of a run as a PNG."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..figures import new_figure, save_figure


def save_curves(path: Path, rows: list[dict[str, Any]], title: str) -> None:
    """Plot M, both losses and k over images seen, from rows of metrics.jsonl. Without rows, write nothing."""
    if not rows:
        return
    figure, (upper, lower) = new_figure(rows=2, ratios=(2, 1), share_x=True)
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
    save_figure(path, figure)
