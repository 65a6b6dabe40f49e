"""docs/demo-settings.png, from the table on its page: python docs/make_settings_plot.py."""

from __future__ import annotations

from pathlib import Path

from fastbegan.figures import new_figure, save_figure

HERE = Path(__file__).resolve().parent
_COLOURS = {
    "beta1 not 0.5": "#999999",
    "beta1 0.5": "#1f77b4",
    "and a rate that falls": "#ff7f0e",
    "and hair always darker than skin": "#2ca02c",
    "and small first weights": "#9467bd",
}
_LIMITS = (0.45, 1.05)  # of sharpness: one run is beyond, which learned nothing


def kind(faces: str, beta1: str, falls: str, otherwise: str) -> str:
    """Which of the steps of the search a run belongs to."""
    if beta1 != "0.5":
        return "beta1 not 0.5"
    if falls == "-":
        return "beta1 0.5"
    if not faces.startswith(("2", "as they are")):
        return "and a rate that falls"
    return "and small first weights" if "first weights x 0" in otherwise else "and hair always darker than skin"


if __name__ == "__main__":
    table = (HERE / "demo-settings.md").read_text(encoding="utf-8").partition("## What was tried")[2].splitlines()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table if line.startswith("|")][2:]
    figure, (ax,) = new_figure(width=7, height=4.5)
    for name, colour in _COLOURS.items():
        points = [(float(row[8]), float(row[9])) for row in rows if kind(row[0], row[2], row[4], row[6]) == name]
        ax.scatter(*zip(*points, strict=True), s=28, color=colour, label=name)
    ax.axvline(0.75, color="#bbbbbb", zorder=0)
    ax.axhline(0.4, color="#bbbbbb", zorder=0)
    ax.set_xlim(*_LIMITS)
    ax.set_ylim(0, 0.61)
    ax.set_xlabel("sharpness")
    ax.set_ylabel("variety")
    ax.legend(frameon=False)
    save_figure(HERE / "demo-settings.png", figure)
