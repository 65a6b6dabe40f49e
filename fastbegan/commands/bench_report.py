"""`fastbegan bench report`: results of `pytest bench/` as Markdown and plots."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..measure.report import write_report


@dataclass(frozen=True)
class BenchReport:
    """Make tables and plots of what `pytest bench/ --results FILE.json` measured."""

    results: Positional[tuple[Path, ...]] = (Path("bench/results"),)
    """JSON files, or folders of them; of each device the newest is shown, and the others as its history."""
    out: Path | None = None
    """A folder for report.md and its pictures. Default: print the tables only."""
    summary: bool = False
    """Print only the rows of whole steps, as docs/speed.md shows them."""

    def run(self) -> int:
        return write_report(self.results, out=self.out, as_summary=self.summary)
