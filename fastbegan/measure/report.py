"""`fastbegan bench report`: results of `pytest bench/` as Markdown and pictures."""

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

_REST = "the rest"  # as the counts call it
_BLUE, _GREY, _RED = "#1f77b4", "#999999", "#d62728"


def load_all(paths: Sequence[Path]) -> list[Results]:
    """Results of files, or of all JSON files in folders, the oldest first. Raises UserError where there are none."""
    files: list[Path] = []
    for path in paths:
        files += sorted(path.glob("*.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"no results in {', '.join(map(str, paths))}; pytest bench/ --results FILE.json makes some")
    return sorted((Results.load(path) for path in files), key=lambda one: one.machine.get("date", ""))


def newest(every: Iterable[Results]) -> list[Results]:
    """Of each device its last results."""
    return list({slug(one.machine): one for one in every}.values())


def markdown(results: Results) -> str:
    """One run: the machine, a table for each suite, what was counted."""
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


def readme(every: Iterable[Results]) -> str:
    """The README's section on speed: whole steps on every device that was measured, and what was not."""
    lines = [_line(("device", "date", "step", "ms", "images/s", "times as fast as")), _line(["---"] * 6)]
    gpu = False
    for results in newest(every):
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
            " No GPU has been measured yet: the Triton kernels were checked under the interpreter and cross-compiled"
            " for sm_80, sm_90 and sm_100, and figures for GPUs (`fastbegan bench plan`) are a model."
        )
    return "\n".join([*lines, words, ""])


def write_report(paths: Sequence[Path], *, out: Path | None, as_readme: bool) -> int:
    """Print the newest results of each device as Markdown, or write them with pictures to the folder `out`."""
    every = load_all(paths)
    if as_readme:
        print(readme(every), end="")
        return 0
    text = "# Benchmarks\n\n" + "\n".join(markdown(results) for results in newest(every))
    if out is None:
        print(text, end="")
        return 0
    make_folder(out)
    for results in newest(every):
        name = slug(results.machine)
        pictures = {"speed-up": speed_up(results), "roofline": roofline(results)}
        pictures |= {"history": history([one for one in every if slug(one.machine) == name])}
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
    """Bars: how many times as fast as what it is held to, for every row."""
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
    """Arithmetic done over its intensity, under the ceilings that were measured in the same run."""
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
        mine = [row for row in rows if row.group == group]
        reached = [1e3 * (row.flops or 0) / row.ms for row in mine]
        axes.plot([(row.flops or 0) / (row.moved or 1) for row in mine], reached, marker, label=group, markersize=5)
    axes.set(xscale="log", yscale="log", xlabel="FLOPs a byte that must be moved", ylabel="FLOP/s")
    axes.set_title(f"{results.machine['device']}, {results.machine['date']}", fontsize=10)
    axes.legend(frameon=False, fontsize=8)
    return figure


def breakdown(results: Results) -> Any:
    """Where the time of whole steps goes."""
    rows = [row for row in results.rows if row.breakdown]
    if not rows:
        return None
    from matplotlib import colormaps

    seen = [_large(row.breakdown) for row in rows]
    names = [*dict.fromkeys(name for shares in seen for name in shares if name != _REST), _REST]
    figure, (axes,) = new_figure(height=1.6 + 0.5 * len(rows))
    left = [0.0] * len(rows)
    for place, name in enumerate(names):
        shares = [100 * one.get(name, 0.0) for one in seen]
        label = name.strip("_")  # matplotlib hides those that begin so
        axes.barh([row.name for row in rows], shares, left=left, label=label, color=colormaps["tab20"](place % 20))
        left = [a + b for a, b in zip(left, shares, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("percent of the step")
    axes.legend(frameon=False, fontsize=7, ncols=2, loc="upper left", bbox_to_anchor=(-0.3, -0.25))
    axes.set_title(f"{results.machine['device']}, {results.machine['date']}", fontsize=10)
    return figure


def _large(breakdown: dict[str, float]) -> dict[str, float]:
    """Shares that can be seen; all others are in the rest."""
    found = {name: share for name, share in breakdown.items() if share >= 0.02 and name != _REST}
    return found | {_REST: 1 - sum(found.values())}


def history(every: Sequence[Results]) -> Any:
    """Ratios of whole steps over commits; nothing for a single run."""
    if len(every) < 2:
        return None
    figure, (axes,) = new_figure(height=5)
    labels = [f"{one.machine.get('commit') or '?'}\n{one.machine['date']}" for one in every]
    for key in dict.fromkeys(row.key for one in every for row in one.rows if row.group == "step"):
        found: list[Row | None] = [next((row for row in one.rows if row.key == key), None) for one in every]
        axes.plot(
            range(len(every)),
            [row.ratio if row and row.ratio else float("nan") for row in found],
            marker="o",
            label=key,
            linewidth=1.2,
        )
    axes.set_xticks(range(len(every)), labels, fontsize=8)
    axes.set_ylabel("times as fast as eager PyTorch")
    axes.legend(frameon=False, fontsize=8, ncols=2, loc="upper left", bbox_to_anchor=(0, -0.15))
    return figure


if __name__ == "__main__":  # for machines without the libraries of the command line
    sys.exit(write_report([Path(path) for path in sys.argv[1:]], out=None, as_readme=False))
