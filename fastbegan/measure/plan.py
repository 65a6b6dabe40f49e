"""`fastbegan bench plan`: what training a preset would take on other GPUs. A model, not a measurement."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from ..config import ModelConfig, TrainConfig
from ..errors import UserError
from ..training.cost import step_cost
from .results import Results


@dataclass(frozen=True)
class Gpu:
    """A data-center card in its SXM form, by its data sheet: dense FLOP/s, bytes and bytes/s, watts."""

    name: str
    precision: str
    peak: float
    memory: float
    capacity: float
    nvlink: float
    pcie: float
    watts: float
    cards: int
    """In a usual node."""


# The precision is the fastest that the step supports there. Links: bytes a second that an all-reduce gets of a card's
# NVLink 1 to 5 one way, assumed to be 85 to 90 % of it, and of PCIe 3, 3, 4, 5 and 5 x16, assumed to be 75 %.
GPUS = {
    "p100": Gpu("P100", "float32", 10.6e12, 732e9, 16e9, 68e9, 12e9, 300, 4),
    "v100": Gpu("V100", "fp16", 125e12, 900e9, 32e9, 130e9, 12e9, 300, 8),
    "a100": Gpu("A100 80 GB", "bf16", 312e12, 2039e9, 80e9, 270e9, 24e9, 400, 8),
    "h100": Gpu("H100", "bf16", 989e12, 3350e9, 80e9, 400e9, 48e9, 700, 8),
    "b200": Gpu("B200", "bf16", 2250e12, 8000e9, 180e9, 800e9, 48e9, 1000, 8),
}
# shares of the peak that a whole step reaches where nothing was measured: convolution nets in half precision keep
# tensor cores far less busy than float32 units
ASSUMED = {"float32": 0.50, "fp16": 0.20, "bf16": 0.20}
COPY_SHARE = 0.8  # of the memory's bandwidth, by a kernel that only moves data
NETWORK_SHARE = 0.8  # of a node's link to the others that an all-reduce gets
_LATENCY = 2e-5  # seconds from a rank to the next
_LOSSES = 12  # bytes: L(x), L(G(z)) and whether to stop
_LAUNCH = 1e-5  # seconds between two steps that are a CUDA graph each
PASSES = 14  # how often the activations of a step cross the memory: written, read forward, read and written back


@dataclass(frozen=True)
class Plan:
    """A preset on some GPUs; seconds are of one step."""

    gpu: str
    gpus: int
    precision: str
    share: float
    measured: bool
    """Whether the share of the peak was measured on such a card."""
    arithmetic: float
    memory: float
    gather: float
    sent: int
    """Bytes of gradients that the ranks sum up in a step."""
    network: float
    """Seconds that this takes, and ..."""
    communication: float
    """... those of them in which nothing else is done."""
    step: float
    images_per_second: float
    efficiency: float
    """Images a second of a card, by those of a card alone."""
    hours: float
    kwh: float
    limit: str
    """What takes longest: compute, memory, images or network."""
    fits: bool
    """Whether a card holds its part of the batch."""


def plan(
    model: ModelConfig, train: TrainConfig, gpu: str, gpus: int, *, images: int, share: float | None = None,
    measured: bool = False, link: str = "nvlink", network: float = 100.0,
) -> Plan:  # fmt: skip
    """Estimate `images` images on `gpus` cards, `train.batch_size` on each; `share` of the peak, else an assumed one.

    `link` joins the cards of a node, nvlink or pcie; `network` the nodes, in Gb/s of each. Raises UserError for an
    unknown card and for numbers that cannot be.
    """
    if gpu not in GPUS:
        raise UserError(f"gpu is {gpu!r}; accepted: {', '.join(GPUS)}")
    if gpus < 1:
        raise UserError(f"gpus is {gpus}; accepted: whole numbers from 1")
    if network <= 0:
        raise UserError(f"network is {network:g}; accepted: numbers above 0, in Gb/s")
    if share is not None and not 0 < share <= 1:
        raise UserError(f"share is {share}; accepted: above 0 and up to 1")
    card = GPUS[gpu]
    share = ASSUMED[card.precision] if share is None else share
    half = card.precision != "float32"
    cost = step_cost(model, train)
    moved = PASSES * cost.kept * train.batch_size // (2 if half else 1)
    gathered = train.batch_size * 3 * model.size**2 * (1 + (2 if half else 4))
    arithmetic = cost.flops / (share * card.peak)
    memory = moved / (COPY_SHARE * card.memory)
    gather = gathered / (COPY_SHARE * card.memory)
    work = max(arithmetic, memory)  # kernels either multiply or move
    slowest = card.nvlink if link == "nvlink" else card.pcie
    if gpus > card.cards:  # a ring crosses each node's link to the others once
        slowest = min(slowest, NETWORK_SHARE * network * 1e9 / 8)
    of_g, of_d = (
        all_reduce_seconds(4 * count, gpus, slowest, _LATENCY)
        for count in (cost.generator, cost.parameters - cost.generator)
    )
    of_losses = all_reduce_seconds(_LOSSES, gpus, slowest, _LATENCY)
    # G's gradients travel while D still works on x, D's and the losses when all else is done
    communication = of_d + of_losses + max(0.0, of_g - work * cost.after_generator / cost.flops)
    alone = work + gather + _LAUNCH
    step = alone + communication
    parts = {"compute": arithmetic, "memory": memory, "images": gather, "network": of_g + of_d + of_losses}
    limit = max(parts, key=lambda name: parts[name])
    rate = gpus * train.batch_size / step
    hours = images / rate / 3600
    # activations are half as large in half precision, the rest of the model stays float32
    needed = cost.memory - (cost.kept * train.batch_size // 2 if half else 0)
    return Plan(
        card.name, gpus, card.precision, share, measured, arithmetic, memory, gather, 4 * cost.parameters,
        parts["network"], communication, step, rate, alone / step, hours, hours * gpus * card.watts / 1e3, limit,
        needed < 0.9 * card.capacity,
    )  # fmt: skip


def all_reduce_seconds(size: int, ranks: int, bandwidth: float, latency: float) -> float:
    """An all-reduce of `size` bytes, each way at `bandwidth`: in a ring, or in a tree where that is faster."""
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * latency
    tree = 2 * size / bandwidth + 2 * math.ceil(math.log2(ranks)) * latency
    return min(ring, tree)


def measured_share(folder: Path, gpu: str) -> float | None:
    """The largest share of a card's peak that a whole step reached, by the results in `folder`; None without any."""
    card, best = GPUS[gpu], 0.0
    for path in sorted(folder.glob("*.json")):
        results = Results.load(path)
        if gpu.upper() not in results.machine["device"].upper():
            continue
        for row in results.rows:
            if row.group == "step" and row.flops and row.precision == card.precision:
                best = max(best, 1e3 * row.flops / row.ms / card.peak)
    return best or None
