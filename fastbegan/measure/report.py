"""The report of `fastbegan bench report`: results of `pytest bench/` as Markdown and plots."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..figures import new_figure, save_figure
from ..files import atomic, make_folder
from .machine import slug
from .results import HEAD, Results, Row, cells, count_lines, title

_REST = "the rest"  # the name in a row's breakdown
_BLUE, _GREY, _RED = "#1f77b4", "#999999", "#d62728"


def load_all(paths: Sequence[Path]) -> list[Results]:
    """Load results from JSON files and folders of them, the oldest first. Raises UserError where there are none."""
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no results in {', '.join(map(str, paths))}; pytest bench/ --results FILE.json makes some")
    return sorted((Results.load(path) for path in files), key=lambda results: results.machine.get("date", ""))


def newest(runs: Iterable[Results]) -> list[Results]:
    """The last results of each device; `runs` go from old to new."""
    return list({slug(run.machine): run for run in runs}.values())


def markdown(results: Results) -> str:
    """One run as Markdown: its machine, a table per group, counts, and shares of time."""
    machine = results.machine
    facts = ", ".join(f"{name} {value}" for name, value in machine.items() if name != "device" and value is not None)
    lines = [f"## {machine['device']}", "", f"{title(results)}. Measured {facts}.", ""]
    for group in dict.fromkeys(row.group for row in results.rows):
        lines += [f"### {group}", "", _line(HEAD), _line(["---"] * len(HEAD))]
        lines += [_line(cells(row, results.roofline)) for row in results.rows if row.group == group]
        lines.append("")
    if counts := count_lines(results):
        lines += ["### counted", "", *(f"- {line}" for line in counts), ""]
    for row in results.rows:
        if row.breakdown:
            shares = ", ".join(f"{name} {share:.0%}" for name, share in row.breakdown.items())
            lines += [f"Where the time of {row.key} goes: {shares}.", ""]
    return "\n".join(lines)


def _line(values: Sequence[str]) -> str:
    return f"| {' | '.join(values)} |"


def summary(runs: Iterable[Results]) -> str:
    """The table of docs/speed.md: whole steps on every device, and a note where no GPU was measured."""
    lines = [_line(("device", "date", "step", "ms", "images/s", "times as fast as")), _line(["---"] * 6)]
    gpu = False
    for results in newest(runs):
        gpu |= "capability" in results.machine
        for row in results.rows:
            if row.group == "step":
                ratios = ", ".join(f"{value:.2f} {name}" for name, value in row.ratios.items())
                name, *_, ms, images = row.name, "", f"{row.ms:.3g}", f"{1e3 * (row.images or 0) / row.ms:,.0f}"
                machine = results.machine
                lines.append(_line((machine["device"], machine["date"], f"{name} {row.precision}", ms, images, ratios)))
    lines.append("")
    words = "Measured with `pytest bench/`; each ratio is of turns taken in one run."
    if not gpu:
        words += (
            " No GPU has been measured yet: the Triton kernels were checked under the interpreter, and their PTX was"
            " [executed on a CPU](ptx.md) against float64. Figures for GPUs (`fastbegan bench plan`) are a model."
        )
    return "\n".join([*lines, words, ""])


def write_report(paths: Sequence[Path], *, out: Path | None, as_summary: bool) -> int:
    """Print the newest results of each device as Markdown, or write them with plots.

    Args:
        paths: JSON files of results, and folders of them.
        out: Folder for report.md and its plots; None prints the tables.
        as_summary: Print the table of docs/speed.md instead.

    Returns:
        The exit code.

    Raises:
        UserError: There are no results, or `out` cannot be written to.
    """
    runs = load_all(paths)
    if as_summary:
        print(summary(runs), end="")
        return 0
    text = "# Benchmarks\n\n" + "\n".join(markdown(results) for results in newest(runs))
    if out is None:
        print(text, end="")
        return 0
    make_folder(out)
    for results in newest(runs):
        name = slug(results.machine)
        pictures = {"speed-up": speed_up(results), "roofline": roofline(results)}
        pictures |= {"history": history([run for run in runs if slug(run.machine) == name])}
        pictures |= {"breakdown": breakdown(results)}
        for kind, figure in pictures.items():
            if figure is not None:
                save_figure(out / f"{name}-{kind}.png", figure)
                text += f"\n![{kind} on {results.machine['device']}]({name}-{kind}.png)\n"
    with atomic(out / "report.md") as file:
        file.write(text.encode())
    print(f"written: {out / 'report.md'}")
    return 0


def speed_up(results: Results) -> Any:
    """Bars: the speed-up of every row over its baseline, the first of its ratios; None where no row has one."""
    rows = [row for row in results.rows if row.ratio is not None and row.group != "start-up"]
    if not rows:
        return None
    figure, (axes,) = new_figure(height=1.2 + 0.26 * len(rows))
    ratios = [row.ratio or 0.0 for row in rows]
    bars = axes.barh([row.key for row in rows], ratios, color=[_BLUE if value >= 0.95 else _RED for value in ratios])
    axes.bar_label(bars, fmt="%.2f", padding=3, fontsize=8)
    axes.axvline(1, color=_GREY, linewidth=1)
    axes.invert_yaxis()
    axes.tick_params(axis="y", labelsize=8)
    axes.set_xlabel("times as fast as eager PyTorch\n(data: ImageFolder and DataLoader; train: the textbook step)")
    axes.set_title(f"{results.machine['device']}, {results.machine['date']}", fontsize=10)
    return figure


def roofline(results: Results) -> Any:
    """The roofline plot: FLOP/s over FLOPs per byte, under the ceilings measured in the same run."""
    rows = [row for row in results.rows if row.flops and row.moved]
    if not rows:
        return None
    figure, (axes,) = new_figure(height=4.5)
    copied = results.roofline["copy_bytes_per_s"]
    places = [row.flops / row.moved for row in rows if row.flops and row.moved]
    low, high = min(places) / 4, max(places) * 4
    for precision in sorted({row.precision for row in rows}):
        rate = results.roofline["flop_per_s"].get(precision)
        if rate:
            points = [low, max(low, rate / copied), max(high, 2 * rate / copied)]
            axes.plot(points, [min(rate, copied * at) for at in points], color=_GREY, label=f"ceiling, {precision}")
    groups = sorted({row.group for row in rows})
    for group, marker in zip(groups, "osd^v<>*PX", strict=False):
        members = [row for row in rows if row.group == group]
        reached = [1e3 * (row.flops or 0) / row.ms for row in members]
        axes.plot([(row.flops or 0) / (row.moved or 1) for row in members], reached, marker, label=group, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs per byte that must be moved", ylabel="FLOP/s")
    axes.set_title(f"{results.machine['device']}, {results.machine['date']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def breakdown(results: Results) -> Any:
    """Stacked bars: shares of the time of whole steps, by operation."""
    rows = [row for row in results.rows if row.breakdown]
    if not rows:
        return None
    from matplotlib import colormaps

    breakdowns = [_large(row.breakdown) for row in rows]
    names = [*dict.fromkeys(name for shares in breakdowns for name in shares if name != _REST), _REST]
    figure, (axes,) = new_figure(height=1.6 + 0.5 * len(rows))
    left = [0.0] * len(rows)
    for place, name in enumerate(names):
        shares = [100 * breakdown.get(name, 0.0) for breakdown in breakdowns]
        label = name.strip("_")  # matplotlib hides labels that begin with one
        axes.barh([row.name for row in rows], shares, left=left, label=label, color=colormaps["tab20"](place % 20))
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("percent of the step")
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(-0.3, -0.25))
    axes.set_title(f"{results.machine['device']}, {results.machine['date']}", fontsize=10)
    return figure


def _large(breakdown: dict[str, float]) -> dict[str, float]:
    """Shares of 2 % and more; the others are summed up in the rest."""
    large = {name: share for name, share in breakdown.items() if share >= 0.02 and name != _REST}
    return large | {_REST: 1 - sum(large.values())}


def history(runs: Sequence[Results]) -> Any:
    """Lines: ratios of whole steps over the runs of one device; None for a single run."""
    if len(runs) < 2:
        return None
    figure, (axes,) = new_figure(height=5)
    labels = [f"{run.machine.get('commit') or '?'}\n{run.machine['date']}" for run in runs]
    for key in dict.fromkeys(row.key for run in runs for row in run.rows if row.group == "step"):
        rows: list[Row | None] = [next((row for row in run.rows if row.key == key), None) for run in runs]
        ratios = [row.ratio if row and row.ratio else float("nan") for row in rows]
        axes.plot(range(len(runs)), ratios, marker="o", label=key, linewidth=1.2)
    axes.set_xticks(range(len(runs)), labels, fontsize=8)
    axes.set_ylabel("times as fast as eager PyTorch")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.15))
    return figure


if __name__ == "__main__":  # for machines without the libraries of the command line
    sys.exit(write_report([Path(path) for path in sys.argv[1:]], out=None, as_summary=False))
