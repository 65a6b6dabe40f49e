"""The report of an experiment: text, tables and pictures in the order of their calls."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..files import atomic
from ..runs.sheets import save_png


class Page:
    """The report.md of `folder`, until `write` writes it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.checks: list[dict[str, Any]] = []
        self.findings: list[str] = []
        self._text: list[str] = []

    def say(self, *paragraphs: str) -> None:
        """Add paragraphs."""
        self._text += [paragraph.strip() for paragraph in paragraphs]

    def table(self, head: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
        """Add a table; floats get three significant digits."""
        self._text.append(_table(head, rows))

    def picture(self, name: str, picture: np.ndarray | Image.Image, caption: str) -> None:
        """Write NAME.png, uint8 [H, W, 3] or an image, and add it."""
        save_png(self.folder / f"{name}.png", picture)
        self.show(f"{name}.png", caption)

    def show(self, file: str, caption: str) -> None:
        """Add a picture file of the folder."""
        self._text += [f"![{caption}]({file})", f"*{caption}*"]

    def note(self, finding: str) -> None:
        """Add a finding that the paper does not lead one to expect; the gallery shows it too."""
        self.findings.append(finding)

    def check(self, expected: str, observed: str, holds: bool) -> None:
        """Add an expectation from the paper, the figures observed, and whether it holds."""
        self.checks.append({"expected": expected, "found": observed, "holds": bool(holds)})

    def write(self, head: Sequence[str], limits: Iterable[str]) -> None:
        """Write report.md: `head`, the text, checks, findings, and `limits` last."""
        lines = [*head, *self._text]
        if self.checks:
            rows = [(row["expected"], row["found"], "yes" if row["holds"] else "**no**") for row in self.checks]
            lines += ["## What was expected", _table(("expected", "found", "holds"), rows)]
        if self.findings:
            lines += ["## What else was found", "\n".join(f"- {text[:1].upper()}{text[1:]}." for text in self.findings)]
        lines += ["## Limits", *limits]
        with atomic(self.folder / "report.md") as file:
            file.write(("\n\n".join(lines) + "\n").encode())


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(_shown, line))} |" for line in lines)


def _shown(value: object) -> str:
    if isinstance(value, float):
        return "not a number" if value != value else f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return str(value).replace("|", "\\|")  # an unescaped bar would end the cell
