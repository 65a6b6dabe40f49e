"""`fastbegan info`: what a run is and how far it came, and the table of presets."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

from .config import PRESETS, ModelConfig, TrainConfig
from .nets.models import Discriminator, Generator, count_parameters
from .objective import OBJECTIVES
from .runs.checkpoint import damage, list_checkpoints
from .runs.folder import RunFolder

# FLOP/s that a step can count on: measured with `fastbegan bench step` on two CPU cores, assumed for a GPU
_CPU_RATE, _GPU_RATE = 8e10, 2e13


@dataclass(frozen=True)
class StepCost:
    """What one training step needs, counted without running it."""

    parameters: int
    flops: int
    generator: int
    """Parameters of G alone."""
    after_generator: int
    """FLOPs that are still to be done when G's gradients are complete, and can travel between ranks."""
    kept: int
    """Bytes of activations that the step keeps for its backward passes at its fullest, an image of the batch."""
    memory: int
    """Bytes in all, modelled: weights, gradients, Adam's two moments, the average, packed weights, activations."""


def step_cost(model: ModelConfig, train: TrainConfig, dtype: torch.dtype | None = None) -> StepCost:
    """Count one step on the meta device: no arithmetic is done and no memory is used.

    `dtype` is the compute type (None: float32). `flops` counts a multiply-add as two, convolutions and matrix products
    only.
    """
    textbook = train.passes == "textbook"
    with torch.device("meta"):
        generator, discriminator = Generator(model), Discriminator(model)
        discriminator.encoder.recompute = train.recompute
        real = torch.empty(train.batch_size, 3, model.size, model.size)
        z = torch.empty(train.batch_size, model.latent)
        if textbook and dtype is not None:  # autocast does not know the meta device
            for net in (generator, discriminator):
                net.to(dtype)
            real, z = real.to(dtype), z.to(dtype)
        ledger, counter = _Ledger(), FlopCounterMode(display=False)
        done: dict[torch.nn.Module, int] = {}  # FLOPs until a net's gradients were complete
        objective = OBJECTIVES[train.passes](
            generator, discriminator, eta=train.eta, dtype=None if textbook else dtype,
            ready=lambda net: done.update({net: counter.get_total_flops()}),
        )  # fmt: skip
        with counter, ledger:
            if train.updates == "simultaneous" and train.latents == "shared":
                objective.shared(real, z, torch.zeros(()))
            else:
                objective.for_discriminator(real, z, torch.zeros(()))
                objective.for_generator(z)
    parameters = count_parameters(generator, discriminator)
    # generator: weights, gradients, two moments, average; discriminator: all but the average
    weights = 4 * (5 * count_parameters(generator) + 4 * count_parameters(discriminator))
    packed = 2 * (dtype or torch.float32).itemsize * parameters  # and their gradients
    kept = ledger.peak // train.batch_size
    flops = counter.get_total_flops()
    memory = weights + packed + 3 * real.nbytes + ledger.peak  # the batch, G's images, and a gradient of either
    return StepCost(parameters, flops, count_parameters(generator), flops - done[generator], kept, memory)


class _Ledger(saved_tensors_hooks):
    """Bytes of activations that backward passes keep alive, and the most of them at a time."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()
        super().__init__(self._keep, lambda held: held.tensor)

    def _keep(self, tensor: torch.Tensor) -> _Held:
        owner = tensor if tensor._base is None else tensor._base
        leaf = owner.is_leaf and owner.requires_grad  # weights, packed or not, and the batch: counted apart
        return _Held(self, tensor, 0 if leaf else tensor.untyped_storage().nbytes())

    def hold(self, storage: int, size: int, change: int) -> None:
        """One holder more, or less, of a storage."""
        before = self._holders[storage]
        self._holders[storage] += change
        if not before or not self._holders[storage]:
            self.now += change * size
            self.peak = max(self.peak, self.now)


class _Held:
    """A saved tensor, for as long as autograd keeps it."""

    def __init__(self, ledger: _Ledger, tensor: torch.Tensor, size: int) -> None:
        self.ledger, self.tensor, self.size = ledger, tensor, size
        self.storage = tensor.untyped_storage()._cdata
        ledger.hold(self.storage, size, 1)

    def __del__(self) -> None:
        self.ledger.hold(self.storage, self.size, -1)


def run_seconds(model: ModelConfig, train: TrainConfig, device: torch.device) -> float:
    """About how long a run takes, by its FLOPs."""
    seconds = step_cost(model, train).flops / (_GPU_RATE if device.type == "cuda" else _CPU_RATE)
    lengths = [60 * train.minutes] if train.minutes else []
    lengths += [seconds * train.steps] if train.steps else []
    lengths += [seconds * train.images / train.batch_size] if train.images else []
    return min(lengths)


def preset_table() -> list[tuple[str, ...]]:
    """Rows of the table of presets, the header first."""
    rows = [("preset", "image", "n", "D + G", "GFLOPs/step", "memory", "images seen")]
    for name, preset in PRESETS.items():
        cost = step_cost(preset.model, preset.train)
        rows.append(
            (
                name,
                f"{preset.model.size} px",
                f"{preset.model.filters}",
                f"{cost.parameters:,}",
                f"{cost.flops / 1e9:,.1f}",
                f"{cost.memory / 2**20:,.0f} MiB",
                f"{preset.train.images or 0:,}",
            )
        )
    return rows


def preset_markdown() -> str:
    """The table of presets as Markdown, for the README."""
    header, *rows = preset_table()
    lines = [header, ("---",) + ("---:",) * (len(header) - 1), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def show_presets(*, markdown: bool) -> int:
    """Print the table of presets."""
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
    """Print what the run in `path` is and how far it came. Raises UserError where there is none."""
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
        (
            "objective",
            f"gamma {config.train.gamma:g}, {config.train.updates} updates, {config.train.latents} z",
        ),
    ]
    if rows:
        last = rows[-1]
        lines += [
            (
                "progress",
                f"step {last['step']:,}, {last['images']:,} images, {last['images_per_second']:,.0f} images/s",
            ),
            (
                "losses",
                f"L(x) {last['loss_real']:.4f}, L(G(z)) {last['loss_fake']:.4f}, gap {last['gap']:.4f}",
            ),
            ("balance", f"k {last['k']:.4f}, M {last['convergence']:.4f}, lr {last['lr']:g}"),
        ]
        if spread := [row["diversity"] for row in rows if "diversity" in row]:
            lines.append(("diversity", f"{spread[-1]:.3f} (mean distance between samples)"))
    for checkpoint in list_checkpoints(folder.checkpoints):
        lines.append(("checkpoint", f"{checkpoint.name}: {damage(checkpoint) or 'whole'}"))
    if folder.nonfinite_file.exists():
        lines.append(("stopped", f"numbers were not finite: {folder.nonfinite_file}"))
    for name, value in lines:
        print(f"{name:<12}{value}")
    return 0
