"""Tables of a run: what was wrong, what was dropped, the targets, the times."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from bench.gpu_candidates import network
from bench.gpu_cases import DRY, Case, Outcome, case_of
from bench.gpu_targets import copy_rate, moved_bytes, target_rows
from bench.gpu_timed_cases import best, map_side

PARTS = ("numerics", "hunt", "tuning", "small", "layers", "stages", "compiled")
_TIMED = ("small", "layers", "stages", "compiled")
Rows = list[list[str]]


def _markdown(rows: Rows) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def _line(text: str, length: int) -> str:
    """As much of a text as fits into a cell."""
    return text[-length:].replace("\n", " ").replace("|", "/").strip()


def config_rows(results: Outcome, everything: bool) -> Rows:
    """A row per kernel, mode and tile: how its checks ended; only those with something wrong unless `everything`."""
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in (*results["numerics"], *results["hunt"], *results["tuning"]):
        case = case_of(outcome["case"])
        name = case.op + (" gradient" if case.backward else "") + (" choice" if case.part == "tuning" else "")
        found.setdefault((name, case.mode, case.tile), []).append(outcome)
    rows = [["kernel", "mode", "tile", "right", "bad", "worst error/allowed", "first bad"]]
    for key, outcomes in sorted(found.items()):
        bad = [outcome for outcome in outcomes if outcome["status"] not in ("right", "skipped")]
        if bad or everything:
            count = f"{len(bad)} {'/'.join(sorted({one['status'] for one in bad}))}" if bad else "0"
            right = sum(one["status"] == "right" for one in outcomes)
            worst = max((one.get("excess", 0.0) for one in outcomes), default=0.0)
            rows.append([*key, str(right), count, f"{worst:.2g}", _first(bad[0]) if bad else ""])
    return rows


def failures(results: Outcome) -> int:
    """How many cases were wrong, unsteady, failed, crashed or timed out, and parts that broke off."""
    counts = [outcome["status"] for part in ("facts", *PARTS) for outcome in results[part]]
    return sum(status not in ("right", "timed", "skipped") for status in counts) + len(results["errors"])


def _first(outcome: Outcome) -> str:
    case = case_of(outcome["case"])
    settings = f"{case.shape} taps {case.taps} skip {case.skip} bias {case.bias} {case.activation} {case.alpha}"
    return _line(f"{settings} {'' if case.extra else 'less '}seed {case.seed} {outcome.get('note', '')[-80:]}", 300)


def dropped(results: Outcome) -> list[str]:
    """What was not timed though its checks passed, and failures of the timings themselves."""
    lines: list[str] = []
    for outcome in (one for part in _TIMED for one in results[part]):
        place = " ".join(str(outcome["case"][name]) for name in ("op", "mode", "shape"))
        if outcome["status"] not in ("timed", "skipped"):
            lines.append(f"{place}: {outcome['status']} {_line(outcome.get('note', ''), 120)}")
        lines += [f"{place} {name}: {_line(why[:120], 120)}" for name, why in outcome.get("dropped", {}).items()]
        lines += [f"{place}: {_line(warning[:200], 200)}" for warning in outcome.get("warnings", [])]
        for direction in ("forward", "both"):
            for name, known in outcome.get(direction, {}).items():
                if why := known.get("error") or known.get("capture"):
                    lines.append(f"{place} {direction} {name}: {_line(why[:120], 120)}")
    return lines


def _ratio(outcomes: Iterable[Outcome], direction: str, rival: str, own: str = "fused") -> str:
    """How many times as long the rival took, timed side by side with the best of ours."""
    for outcome in outcomes:
        measured = outcome.get(direction, {})
        other, mine = best(measured, rival), best(measured, own)
        if other and mine:
            return f"{other[1] / mine[1]:.2f}"
    return "-"


def _place(outcome: Outcome) -> tuple[Any, ...]:
    return outcome["case"]["op"], outcome["case"]["mode"], *outcome["case"]["shape"], outcome["case"]["extra"]


def _short(name: str) -> str:
    return name.removeprefix("fused ").replace(" ", "")


def _chosen(outcome: Outcome, backward: bool) -> str:
    """What the automatic choice took for the layers of an op, in their order."""
    found = outcome.get("chosen", {}).items()
    return ", ".join(_short(how) for key, how in found if f"backward={backward}" in key) or "-"


def layer_rows(results: Outcome) -> Rows:
    """A row per shape: what the best tile takes, and how many times as long the others do."""
    columns = ["us", "/eager", "/alg", "/auto", "/comp", "/max", "tile", "auto is"]
    rows = [["op", "n", "map", "batch", *(f"fwd {name}" for name in columns), *(f"both {name}" for name in columns)]]
    for outcome in (*results["stages"], *results["layers"]):
        if outcome["status"] != "timed":
            continue
        case = case_of(outcome["case"])
        row = [case.op, str(case.shape[1]), str(map_side(case)), str(case.shape[0])]
        for direction in ("forward", "both"):
            compiled = [one for one in results["compiled"] if _place(one) == _place(outcome)]
            mine = best(outcome[direction], "fused")
            row.append(f"{1e3 * mine[1]:.1f}" if mine else "-")
            row += [_ratio([outcome], direction, rival) for rival in ("eager", "algebraic", "auto")]
            row += [_ratio(compiled, direction, rival) for rival in ("compile", "max-autotune")]
            row += [_short(mine[0]) if mine else "-", _chosen(outcome, direction == "both")]
        rows.append(row)
    return rows


def small_rows(results: Outcome) -> Rows:
    """Kernels without a matrix product, forward or, where there is one, both ways; for losses shares of the copy rate.

    `moved` counts what the passes move: those of the separate loss read both tensors twice; `least` once.
    """
    rows = [["op", "mode", "shape", "fused us", "/eager", "/alg", "/auto", "/comp", "moved", "least"]]
    for outcome in results["small"]:
        if outcome["status"] != "timed":
            continue
        case, direction = case_of(outcome["case"]), "both" if "both" in outcome else "forward"
        mine = best(outcome[direction], "fused")
        shape = {"equilibrium_update": str(case.shape[0]), "fold": f"{len(network(1))} layers, n {case.shape[1]}"}
        shown = shape.get(case.op, "x".join(map(str, case.shape[:4])))
        name = f"{case.op}{'' if case.extra else ', prediction only'}"
        row = [name, case.mode, shown, f"{1e3 * mine[1]:.1f}" if mine else "-"]
        row += [_ratio([outcome], direction, rival) for rival in ("eager", "algebraic", "auto", "compile")]
        rows.append(row + _shares(case, mine, copy_rate(results["facts"][0])))
    return rows


def _shares(case: Case, mine: tuple[str, float] | None, rate: float) -> list[str]:
    if not (mine and rate) or case.op not in ("one_pass", "l1_reconstruction_loss"):
        return ["-", "-"]
    least = moved_bytes(case)
    again = least * 2 // (4 if case.extra else 3) if case.op != "one_pass" else 0
    return [f"{size / mine[1] * 1e3 / rate:.0%}" for size in (least + again, least)]


def _head(results: Outcome) -> list[str]:
    """The machine, its ceilings, and how each part ended."""
    known = results["facts"][0]
    rates = ", ".join(f"{mode} {rate / 1e12:.0f}" for mode, rate in known.get("flop_per_s", {}).items())
    copies = [known.get(name, math.nan) / 1e12 for name in ("copy_bytes_per_s", "copy_256_mib_bytes_per_s")]
    title = f"{known.get('device', 'unknown device')}, torch {known.get('torch')}, triton {known.get('triton')}"
    title += f", driver {results['driver']}, commit {results['commit']}, {results['date']}, {results['seconds']:.0f} s"
    lines = [title, f"copy {copies[0]:.2f} TB/s, of 256 MiB {copies[1]:.2f}; matrix TFLOP/s: {rates}"]
    if DRY:
        lines.append("DRY RUN under the interpreter: the times below mean nothing.")
    for name in PARTS:
        counts = [outcome["status"] for outcome in results[name]]
        told = ", ".join(f"{counts.count(kind)} {kind}" for kind in sorted(set(counts))) or "nothing ran"
        lines.append(f"{name}: {told}" + (f" ({results['errors'][name]})" if name in results["errors"] else ""))
    return lines


def report(results: Outcome, short: bool) -> str:
    """The tables, wrong configurations first and the longest last; short: a few rows of what is long."""
    parts = _head(results)
    bad, lines = config_rows(results, everything=not short), dropped(results)
    limit, most = (12, 6) if short else (len(bad), len(lines))
    if len(bad) > 1:
        parts += ["", _markdown(bad[: limit + 1])]
        parts += [f"... and {len(bad) - 1 - limit} more"] if len(bad) > limit + 1 else []
    else:
        parts += ["", "No configuration that was checked was wrong."]
    parts += ["", *(f"- {line}" for line in lines[:most])]
    parts += [f"- ... and {len(lines) - most} more dropped"] if len(lines) > most else []
    for rows in (target_rows(results), small_rows(results), layer_rows(results)):
        parts += ["", _markdown(rows)] if len(rows) > 1 else []
    return "\n".join(parts)
