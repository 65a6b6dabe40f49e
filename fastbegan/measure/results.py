"""What a run of benchmarks found: rows, the machine they are from, as JSON and as a table."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table

from ..errors import UserError
from ..files import read_json, write_json


@dataclass
class Row:
    """One thing that was timed, and the others that took turns with it in the same run."""

    group: str
    name: str
    ms: float = 0.0
    """Median of a call, with the 20th and 80th percentile after it."""
    p20: float = 0.0
    p80: float = 0.0
    ratios: dict[str, float] = field(default_factory=dict)
    """How many times as long the others took, by name; the first is what it is held to."""
    precision: str = "float32"
    images: int | None = None
    """How many a call handles."""
    flops: int | None = None
    """Really done in a call: convolutions and matrix products, a multiply-add as two."""
    textbook_flops: int | None = None
    """What the textbook does for the same result."""
    moved: int | None = None
    """Bytes that a call must read and write at least."""
    peak_bytes: int | None = None
    """Of a GPU as measured, else modelled."""
    counts: dict[str, int] = field(default_factory=dict)
    """What does not depend on a clock."""
    breakdown: dict[str, float] = field(default_factory=dict)
    """Shares of the time by operation or kernel, the largest first."""
    accepted: float | None = None
    """The ratio to the first of the others that was accepted on this device before."""

    @property
    def key(self) -> str:
        return f"{self.group} {self.name}"

    @property
    def ratio(self) -> float | None:
        """To what it is held to."""
        return next(iter(self.ratios.values()), None)

    def bound(self, roofline: dict[str, Any]) -> tuple[float, str] | None:
        """The share of the nearer ceiling, "copy" or "matrix", that it reached; None where neither is known."""
        rate = roofline.get("flop_per_s", {}).get(self.precision)
        least = {
            "matrix": self.flops / rate if self.flops and rate else 0.0,
            "copy": self.moved / roofline["copy_bytes_per_s"] if self.moved else 0.0,
        }
        name = max(least, key=lambda name: least[name])
        return (least[name] / (self.ms / 1e3), name) if least[name] else None


@dataclass
class Results:
    """All rows of one run; `machine` as `machine.facts`, `roofline` as `machine.roofline` gives them."""

    machine: dict[str, Any]
    roofline: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Results:
        """Raises UserError where the file is not one of these."""
        value = read_json(path)
        try:
            rows = [Row(**row) for row in value["rows"]]
            return cls(dict(value["machine"]), dict(value["roofline"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not hold results of pytest bench/: {error}") from None


def ratio(others: Sequence[float], own: Sequence[float]) -> float:
    """How many times as long the others took: the median over turns, so that a drift of the machine cancels."""
    return statistics.median(other / mine for other, mine in zip(others, own, strict=True))


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """Their 20th, 50th and 80th percentile."""
    values = sorted(times)
    low, high = (values[round(share * (len(values) - 1))] for share in (0.2, 0.8))
    return low, statistics.median(values), high


HEAD = ("benchmark", "ms", "p20-p80", "images/s", "rate", "bound", "MiB", "times as fast as")


def cells(row: Row, roofline: dict[str, Any]) -> list[str]:
    """A row in words, under `HEAD`."""
    rate = "-"
    bound = row.bound(roofline)
    if bound and bound[1] == "matrix" and row.flops:
        rate = f"{row.flops / row.ms / 1e6:,.0f} GFLOP/s"
    elif row.moved:
        rate = f"{row.moved / row.ms / 1e6:,.1f} GB/s"
    if row.textbook_flops and row.flops:
        rate += f" (textbook's {row.textbook_flops / row.ms / 1e6:,.0f})"
    ratios = ", ".join(f"{value:.2f} {name}" for name, value in row.ratios.items())
    return [
        row.name, number(row.ms), f"{number(row.p20)}-{number(row.p80)}",
        f"{1e3 * row.images / row.ms:,.0f}" if row.images else "-", rate,
        f"{bound[0]:.0%} of {bound[1]}" if bound else "-",
        f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes else "-",
        (ratios or "-") + (f" (accepted {row.accepted:.2f})" if row.accepted else ""),
    ]  # fmt: skip


def number(value: float) -> str:
    """With three digits that count."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(results: Results) -> Table:
    """All rows, a section for each group."""
    shown = Table(title=title(results), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for place, name in enumerate(HEAD):
        shown.add_column(name, justify="left" if place in (0, len(HEAD) - 1) else "right", overflow="fold")
    for group in dict.fromkeys(row.group for row in results.rows):
        shown.add_row(f"[bold]{group}[/bold]")
        for row in results.rows:
            if row.group == group:
                name, *rest = cells(row, results.roofline)
                shown.add_row(f"  {name}", *rest)
    return shown


def title(results: Results) -> str:
    """The machine and its ceilings in a line."""
    machine, roofline = results.machine, results.roofline
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in roofline["flop_per_s"].items())
    copied = f"copy {roofline['copy_bytes_per_s'] / 1e9:,.1f} GB/s"
    return f"{machine['device']}, torch {machine['torch']}; {copied}, {rates}"


def count_lines(results: Results) -> list[str]:
    """What does not depend on a clock, a line a row that has any."""
    return [
        f"{row.key}: " + ", ".join(f"{name} {value:,}" for name, value in row.counts.items())
        for row in results.rows
        if row.counts
    ]
