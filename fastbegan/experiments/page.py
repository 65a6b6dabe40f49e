"""The report of an experiment: text, tables and pictures in the order in which they were added."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import atomic
from ..runs.sheets import save_png


class Page:
    """report.md in `folder`, as it is being written."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checks: list[dict[str, Any]] = []
        self.findings: list[str] = []
        self._text: list[str] = []

    def say(self, *paragraphs: str) -> None:
        """Add text to the report."""
        self._text += [paragraph.strip() for paragraph in paragraphs]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; floats are shown with three digits."""
        self._text.append(_table(head, rows))

    def picture(self, name: str, picture: np.ndarray | Image.Image, caption: str) -> None:
        """Write NAME.png and show it in the report."""
        save_png(self.folder / f"{name}.png", picture)
        self.show(f"{name}.png", caption)

    def show(self, file: str, caption: str) -> None:
        """Show a file of the folder in the report."""
        self._text += [f"![{caption}]({file})", f"*{caption}*"]

    def note(self, finding: str) -> None:
        """Something the figures say that nobody has to expect; the gallery shows it too."""
        self.findings.append(finding)

    def check(self, expected: str, found: str, holds: bool) -> None:
        """Something the paper leads one to expect, and whether it is so."""
        self.checks.append({"expected": expected, "found": found, "holds": bool(holds)})

    def write(self, head: Sequence[str], limits: Iterable[str]) -> None:
        """Write report.md, with the checks and findings behind the text and the limits last."""
        lines = [*head, *self._text]
        if self.checks:
            rows = [(one["expected"], one["found"], "yes" if one["holds"] else "**no**") for one in self.checks]
            lines += ["## What was expected", _table(("expected", "found", "holds"), rows)]
        if self.findings:
            lines += ["## What else was found", "\n".join(f"- {one[:1].upper()}{one[1:]}." for one in self.findings)]
        lines += ["## Limits", *limits]
        with atomic(self.folder / "report.md") as file:
            file.write(("\n\n".join(lines) + "\n").encode())


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_shown, line))} |" for line in lines)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "not a number" if value != value else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")  # else it would end the cell
