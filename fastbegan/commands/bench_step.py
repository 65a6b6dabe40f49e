"""`fastbegan bench step`: the measurement of `measure.step` as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from rich import box
from rich.console import Console
from rich.table import Table

from ..device import pick_compile, pick_device, pick_precision
from ..errors import UserError
from ..measure import machine
from ..measure.step import COMPILED, DEFAULT_MODES, MODES, measure
from ..runs.folder import settings_of


@dataclass(frozen=True)
class BenchStep:
    """Time all modes of the training step on this machine, turn by turn in one run."""

    preset: str = "demo"
    """Nets, batch and loss: demo, demo-64, paper-32, paper-64, paper-128, paper-256, or a run's config.json."""
    size: int | None = None
    """Image size. Default: the preset's."""
    filters: int | None = None
    """n. Default: the preset's."""
    batch_size: int | None = None
    """Images per step. Default: the preset's."""
    modes: str = "all"
    """textbook, single-pass, joint, alternating, each also with +compile; several with commas between. all: these four,
    textbook+compile and single-pass+compile."""
    precision: str = "auto"
    """auto, float32, tf32, bf16, fp16; several with commas between."""
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    """torch.compile's mode for modes with +compile; off leaves these modes out."""
    rounds: int = 10
    """Turns; the median counts."""
    cudnn_search: Literal["auto", "off"] = "auto"
    """As for train."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print only JSON."""

    def run(self) -> int:
        return bench_step(self)


def bench_step(options: BenchStep) -> int:
    """Time the modes and print a table, or only JSON; returns the exit code. Raises UserError for bad values."""
    modes: Sequence[str] = DEFAULT_MODES if options.modes == "all" else options.modes.split(",")
    for mode in modes:
        if mode.removesuffix(COMPILED) not in MODES:
            raise UserError(f"mode is {mode!r}; accepted: {', '.join(MODES)}, each also with {COMPILED}")
    if options.rounds < 1:
        raise UserError(f"rounds is {options.rounds}; accepted: whole numbers from 1")
    preset = settings_of(options.preset)
    model = preset.model.resized(options.size, options.filters)
    batch_size = preset.train.batch_size if options.batch_size is None else options.batch_size
    train = dataclasses.replace(
        preset.train, batch_size=batch_size, device=options.device, cudnn_search=options.cudnn_search
    )
    device, line = pick_device(train.device)
    names = [pick_precision(name, device)[0] for name in options.precision.split(",")]
    compiler = None
    if any(mode.endswith(COMPILED) for mode in modes):
        compiler, _ = pick_compile("default" if options.compile == "auto" else options.compile, device, 0.0)
    if compiler is None:
        modes = [mode for mode in modes if not mode.endswith(COMPILED)]
    rows = measure(model, train, modes, names, device, compiler, options.rounds, say=None if options.json else print)
    facts = machine.facts(device) | {"device": line}
    facts |= {"model": dataclasses.asdict(model), "batch_size": train.batch_size}
    if options.json:
        print(json.dumps({**facts, "rows": [dataclasses.asdict(row) for row in rows]}, indent=1))
        return 0
    table = Table(title=_title(facts), box=box.SIMPLE, padding=(0, 1, 0, 0))
    table.add_column("mode", no_wrap=True, min_width=19)
    for name in ("type", "ms", "img/s", "GFLOP", "MiB", "eager", "compile"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        costs = (f"{row.ms:.1f}", f"{row.images_per_second:,.0f}", f"{row.flops / 1e9:,.1f}")
        ratios = ("-" if ratio is None else f"{ratio:.2f}" for ratio in (row.ratio_eager, row.ratio_compile))
        table.add_row(row.mode, row.precision, *costs, f"{row.peak_bytes / 2**20:,.0f}", *ratios)
    Console().print(table)
    return 0


def _title(facts: dict[str, Any]) -> str:
    model = facts["model"]
    return f"one step, {model['size']} px, n = {model['filters']}, batch {facts['batch_size']}; {facts['device']}"
