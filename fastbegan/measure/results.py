"""Results of `pytest bench/`: rows of timings and their machine, as JSON and as a table."""

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
    """One benchmark, and its ratios to the baselines that took turns with it in the same run."""

    group: str
    name: str
    ms: float = 0.0
    """Median of a call; `p20` and `p80` are percentiles of the same times."""
    p20: float = 0.0
    p80: float = 0.0
    ratios: dict[str, float] = field(default_factory=dict)
    """How many times as long each baseline took, by name; the first is the one to beat."""
    precision: str = "float32"
    images: int | None = None
    """Images per call."""
    flops: int | None = None
    """Operations of the convolutions and matrix products of a call; a multiply-add counts as two."""
    textbook_flops: int | None = None
    """The same for the textbook's way to the same result."""
    moved: int | None = None
    """Bytes that a call has to read and write at least."""
    peak_bytes: int | None = None
    """Measured on a GPU, else modelled."""
    counts: dict[str, int] = field(default_factory=dict)
    """Figures that do not depend on a clock, such as numbers of kernels."""
    breakdown: dict[str, float] = field(default_factory=dict)
    """Shares of the time by operation or kernel, the largest first."""
    accepted: float | None = None
    """The ratio to the first baseline in the accepted results of this device."""

    @property
    def key(self) -> str:
        """Group and name, which identify the row."""
        return f"{self.group} {self.name}"

    @property
    def ratio(self) -> float | None:
        """The first of `ratios`; None where there is none."""
        return next(iter(self.ratios.values()), None)

    def bound(self, roofline: dict[str, Any]) -> tuple[float, str] | None:
        """The share of the nearer ceiling, "copy" or "matrix", that the row reached; None where neither is known."""
        rate = roofline.get("flop_per_s", {}).get(self.precision)
        least = {
            "matrix": self.flops / rate if self.flops and rate else 0.0,
            "copy": self.moved / roofline["copy_bytes_per_s"] if self.moved else 0.0,
        }
        name = max(least, key=lambda name: least[name])
        return (least[name] / (self.ms / 1e3), name) if least[name] else None


@dataclass
class Results:
    """All rows of one run, with its `machine.facts` and `machine.roofline`."""

    machine: dict[str, Any]
    roofline: dict[str, Any]
    rows: list[Row] = field(default_factory=list)

    def save(self, path: Path) -> None:
        """Write all of it as JSON; makes the folder."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, dataclasses.asdict(self))

    @classmethod
    def load(cls, path: Path) -> Results:
        """Read what `save` wrote. Raises UserError for any other file."""
        value = read_json(path)
        try:
            rows = [Row(**row) for row in value["rows"]]
            return cls(dict(value["machine"]), dict(value["roofline"]), rows)
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} does not hold results of pytest bench/: {error}") from None


def ratio(baseline: Sequence[float], times: Sequence[float]) -> float:
    """How many times as long the baseline took: the median over turns, in which a drift of the machine cancels."""
    return statistics.median(theirs / ours for theirs, ours in zip(baseline, times, strict=True))


def spread(times: Sequence[float]) -> tuple[float, float, float]:
    """20th, 50th and 80th percentile of `times`."""
    values = sorted(times)
    low, high = (values[round(share * (len(values) - 1))] for share in (0.2, 0.8))
    return low, statistics.median(values), high


HEAD = ("benchmark", "ms", "p20-p80", "images/s", "rate", "bound", "MiB", "times as fast as")


def cells(row: Row, roofline: dict[str, Any]) -> list[str]:
    """The cells of a row, in the columns of `HEAD`."""
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
        row.name,
        number(row.ms),
        f"{number(row.p20)}-{number(row.p80)}",
        f"{1e3 * row.images / row.ms:,.0f}" if row.images else "-",
        rate,
        f"{bound[0]:.0%} of {bound[1]}" if bound else "-",
        f"{row.peak_bytes / 2**20:,.0f}" if row.peak_bytes else "-",
        (ratios or "-") + (f" (accepted {row.accepted:.2f})" if row.accepted else ""),
    ]


def number(value: float) -> str:
    """A number with three significant digits, or all digits from 100 on."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def table(results: Results) -> Table:
    """All rows as a table, in a section per group."""
    grid = Table(title=title(results), box=box.SIMPLE, padding=(0, 1, 0, 0))
    for place, name in enumerate(HEAD):
        grid.add_column(name, justify="left" if place in (0, len(HEAD) - 1) else "right", overflow="fold")
    for group in dict.fromkeys(row.group for row in results.rows):
        grid.add_row(f"[bold]{group}[/bold]")
        for row in results.rows:
            if row.group == group:
                name, *rest = cells(row, results.roofline)
                grid.add_row(f"  {name}", *rest)
    return grid


def title(results: Results) -> str:
    """The machine and its ceilings, in a line."""
    machine, roofline = results.machine, results.roofline
    rates = ", ".join(f"{name} {rate / 1e12:.3g} TFLOP/s" for name, rate in roofline["flop_per_s"].items())
    copied = f"copy {roofline['copy_bytes_per_s'] / 1e9:,.1f} GB/s"
    return f"{machine['device']}, torch {machine['torch']}; {copied}, {rates}"


def count_lines(results: Results) -> list[str]:
    """A line per row that has `counts`."""
    return [
        f"{row.key}: " + ", ".join(f"{name} {value:,}" for name, value in row.counts.items())
        for row in results.rows
        if row.counts
    ]
