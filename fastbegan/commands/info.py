"""`fastbegan info`: settings and progress of a run, or the table of presets."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from ..config import PRESETS
from ..display import print_facts
from ..nets.models import Discriminator, Generator, count_parameters
from ..runs.appearance import SHARPNESS, VARIETY
from ..runs.checkpoint import damage, list_checkpoints
from ..runs.folder import RunFolder
from ..training.cost import step_cost


@dataclass(frozen=True)
class Info:
    """Show settings and progress of a run; without a folder, the presets."""

    run_folder: Positional[Path | None] = None
    """The folder that `fastbegan train` made."""
    markdown: bool = False
    """Print the table of presets as Markdown."""

    def run(self) -> int:
        return show_presets(markdown=self.markdown) if self.run_folder is None else show_run(self.run_folder)


def preset_table() -> list[tuple[str, ...]]:
    """Rows of the table of presets, header first; costs are those of a step, memory is modelled for float32."""
    rows = [("preset", "image", "n", "D + G", "GFLOPs/step", "memory", "images seen")]
    for name, preset in PRESETS.items():
        cost = step_cost(preset.model, preset.train)
        shape = (f"{preset.model.size} px", f"{preset.model.filters}", f"{cost.parameters:,}")
        costs = (f"{cost.flops / 1e9:,.1f}", f"{cost.memory / 2**20:,.0f} MiB")
        rows.append((name, *shape, *costs, f"{preset.train.images or 0:,}"))
    return rows


def preset_markdown() -> str:
    """The table of presets as Markdown, for the README."""
    header, *rows = preset_table()
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show_presets(*, markdown: bool) -> int:
    """Print the table of presets; returns the exit code."""
    if markdown:
        print(preset_markdown(), end="")
        return 0
    header, *rows = preset_table()
    table = Table(*header, title="presets; a step of batch 16, FLOPs counted, memory modelled for float32")
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    return 0


def show_run(path: Path) -> int:
    """Print settings and progress of the run in `path`; returns the exit code. Raises UserError where there is none."""
    folder = RunFolder(path)
    config = folder.read_config()
    rows = folder.read_metrics()
    with torch.device("meta"):
        parameters = count_parameters(Generator(config.model), Discriminator(config.model))
    lines = [
        ("run", str(path)),
        ("preset", f"{config.preset}: {config.model.size} px, n = {config.model.filters}"),
        ("parameters", f"{parameters:,} (D + G)"),
        ("data", f"{config.train.data}, batch {config.train.batch_size}"),
        ("objective", f"gamma {config.train.gamma:g}, {config.train.updates} updates, {config.train.latents} z"),
    ]
    if rows:
        last = rows[-1]
        speed = f"{last['images_per_second']:,.0f} images/s"
        losses = f"L(x) {last['loss_real']:.4f}, L(G(z)) {last['loss_fake']:.4f}, gap {last['gap']:.4f}"
        lines += [
            ("progress", f"step {last['step']:,}, {last['images']:,} images, {speed}"),
            ("losses", losses),
            ("balance", f"k {last['k']:.4f}, M {last['convergence']:.4f}, lr {last['lr']:g}"),
        ]
        if looks := [row for row in rows if "variety" in row]:
            lines.append(("sharpness", f"{looks[-1]['sharpness']:.2f} ({SHARPNESS})"))
            lines.append(("variety", f"{looks[-1]['variety']:.2f} ({VARIETY})"))
    for checkpoint in list_checkpoints(folder.checkpoints):
        lines.append(("checkpoint", f"{checkpoint.name}: {damage(checkpoint) or 'whole'}"))
    if folder.nonfinite_file.exists():
        lines.append(("stopped", f"numbers were not finite: {folder.nonfinite_file}"))
    print_facts(lines)
    return 0
