"""`fastbegan bench plan`: the estimate of `measure.plan` as a table or as JSON."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.table import Table

from ..errors import UserError
from ..measure.plan import ASSUMED, COPY_SHARE, GPUS, NETWORK_SHARE, PASSES, Cluster, Plan, measured_share, plan
from ..runs.folder import settings_of
from ..training.cost import step_cost


@dataclass(frozen=True)
class BenchPlan:
    """Estimate what training a preset takes on other GPUs: images/s, hours, energy. A model, not a measurement."""

    preset: str = "paper-128"
    """The nets, and the number of images that they see."""
    gpu: str = "all"
    """p100, v100, a100, h100, b200, or all."""
    gpus: str = "1"
    """How many of them; several numbers with commas between show how it scales: 1,8,64,512."""
    batch_size: int | None = None
    """Images per card and step. Default: the preset's."""
    share: float | None = None
    """Share of the card's peak that a step reaches. Default: the one measured on such a card, else an assumed one."""
    link: Literal["nvlink", "pcie"] = "nvlink"
    """The link between the cards of a node."""
    network: float = 100.0
    """Gb/s between the nodes, per node."""
    results: Path = Path("bench/results")
    """Folder of results of `pytest bench/`, with the measured shares."""
    json: bool = False
    """Print only JSON."""

    def run(self) -> int:
        return bench_plan(self)


def bench_plan(options: BenchPlan) -> int:
    """Print a plan for each GPU and number of cards; returns the exit code. Raises UserError for bad values."""
    preset = settings_of(options.preset)
    batch_size = preset.train.batch_size if options.batch_size is None else options.batch_size
    train = dataclasses.replace(preset.train, batch_size=batch_size)
    images = train.images or 7_000_000
    plans: list[Plan] = []
    for gpu in GPUS if options.gpu == "all" else [options.gpu]:
        measured = measured_share(options.results, gpu) if options.share is None and gpu in GPUS else None
        share = options.share if options.share is not None else measured
        for count in _counts(options.gpus):
            cluster = Cluster(gpu, count, options.link, options.network)
            plans.append(plan(preset.model, train, cluster, images=images, share=share, measured=measured is not None))
    if options.json:
        rows = [dataclasses.asdict(row) for row in plans]
        print(json.dumps({"preset": options.preset, "images": images, "plans": rows}, indent=1))
        return 0
    title = f"{options.preset}: {images:,} images, {train.batch_size} a card a step; a model, not a measurement"
    table = Table(title=title, box=box.SIMPLE, padding=(0, 1, 0, 0))
    for column in ("GPU", "cards", "of peak", "ms/step", "images/s", "a card", "hours", "kWh", "limit"):
        table.add_column(column, justify="left" if column in ("GPU", "limit") else "right", no_wrap=True)
    for row in plans:
        assumed = "" if row.measured or options.share is not None else "?"
        step = (f"{row.share:.0%}{assumed}", f"{1e3 * row.step:.2f}", f"{row.images_per_second:,.0f}")
        whole = (f"{row.efficiency:.0%}", f"{row.hours:,.1f}", f"{row.kwh:,.1f}")
        limit = row.limit if row.fits else "does not fit"
        table.add_row(f"{row.gpu} {row.precision}", str(row.gpus), *step, *whole, limit)
    console = Console()
    console.print(table)
    if len(plans) == 1:
        console.print(_limits(plans[0], train.batch_size))
    console.print(_assumptions(4 * step_cost(preset.model, train).parameters, options.link, options.network))
    return 0


def _limits(row: Plan, batch: int) -> str:
    """Images/s that each part of the step would allow alone."""
    parts = {"compute": row.arithmetic, "memory": row.memory, "images": row.gather, "network": row.network}
    rates = (f"{name} {row.gpus * batch / seconds:,.0f}" for name, seconds in parts.items() if seconds)
    return f"Images a second that each would allow alone: {', '.join(rates)}.\n"


def _assumptions(sent: int, link: str, network: float) -> str:
    shares = ", ".join(f"{share:.0%} in {name}" for name, share in ASSUMED.items())
    return (
        "Peaks, bandwidths and watts are data-sheet values. A share with a question mark was not measured, and is "
        f"assumed: {shares}. Activations cross the memory {PASSES} times a step at {COPY_SHARE:.0%} of its "
        f"bandwidth; images are resident on the card. Cards sum up {sent / 1e6:,.1f} MB of gradients a step, in a ring "
        f"or a tree, G's while D works on x: over {'NVLink' if link == 'nvlink' else 'PCIe'} within a node and "
        f"{network:g} Gb/s between nodes, of which they get {NETWORK_SHARE:.0%}. A card's percentage is how much of "
        "its speed alone it keeps. Energy is the cards' alone, at full power."
    )


def _counts(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UserError(f"gpus is {text!r}; accepted: whole numbers from 1, with commas between")
    return [int(part) for part in text.split(",")]
