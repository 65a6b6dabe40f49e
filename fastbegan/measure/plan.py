"""The estimate of `fastbegan bench plan`: time and energy of a preset on other GPUs. A model, not a measurement.

A step takes the longer of arithmetic and memory traffic, plus the gathering of images, plus the communication that does
not overlap with them. The constants below are data-sheet values and the model's assumptions.
"""

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
    """A data-center card in its SXM form, by its data sheet."""

    name: str
    precision: str
    """The fastest that the step supports on it."""
    peak: float
    """Dense FLOP/s in that precision."""
    memory: float
    """Bytes/s of its memory."""
    capacity: float
    """Bytes of its memory."""
    nvlink: float
    """Bytes/s that an all-reduce gets, one way: assumed to be 85 to 90 % of NVLink 1 to 5."""
    pcie: float
    """The same over PCIe 3, 3, 4, 5 and 5 x16: assumed to be 75 %."""
    watts: float
    cards: int
    """Per node, usually."""


GPUS = {
    "p100": Gpu("P100", "float32", 10.6e12, 732e9, 16e9, 68e9, 12e9, 300, 4),
    "v100": Gpu("V100", "fp16", 125e12, 900e9, 32e9, 130e9, 12e9, 300, 8),
    "a100": Gpu("A100 80 GB", "bf16", 312e12, 2039e9, 80e9, 270e9, 24e9, 400, 8),
    "h100": Gpu("H100", "bf16", 989e12, 3350e9, 80e9, 400e9, 48e9, 700, 8),
    "b200": Gpu("B200", "bf16", 2250e12, 8000e9, 180e9, 800e9, 48e9, 1000, 8),
}
# shares of the peak that a whole step reaches, where none was measured; half precision reaches less, since tensor cores
# wait for memory more than float32 units do
ASSUMED = {"float32": 0.50, "fp16": 0.20, "bf16": 0.20}
COPY_SHARE = 0.8  # of the memory's bandwidth, for a kernel that only moves data
NETWORK_SHARE = 0.8  # of the network's bandwidth, for an all-reduce
_LATENCY = 2e-5  # seconds from a rank to the next
_LOSSES = 12  # bytes: L(x), L(G(z)) and the request to stop
_LAUNCH = 1e-5  # seconds between two CUDA graphs
PASSES = 14  # times that the activations of a step cross the memory, forward and backward


@dataclass(frozen=True)
class Cluster:
    """GPUs of one kind and the links between them. Raises UserError for an unknown card and for impossible numbers."""

    gpu: str
    """A key of GPUS."""
    gpus: int = 1
    link: str = "nvlink"
    """The link between the cards of a node: nvlink or pcie."""
    network: float = 100.0
    """Gb/s between the nodes, per node."""

    def __post_init__(self) -> None:
        if self.gpu not in GPUS:
            raise UserError(f"gpu is {self.gpu!r}; accepted: {', '.join(GPUS)}")
        if self.gpus < 1:
            raise UserError(f"gpus is {self.gpus}; accepted: whole numbers from 1")
        if self.network <= 0:
            raise UserError(f"network is {self.network:g}; accepted: numbers above 0, in Gb/s")

    def all_reduce(self, size: int) -> float:
        """Seconds of an all-reduce of `size` bytes over all cards."""
        card = GPUS[self.gpu]
        bandwidth = card.nvlink if self.link == "nvlink" else card.pcie
        if self.gpus > card.cards:  # a ring over several nodes crosses the network
            bandwidth = min(bandwidth, NETWORK_SHARE * self.network * 1e9 / 8)
        return all_reduce_seconds(size, self.gpus, bandwidth, _LATENCY)


@dataclass(frozen=True)
class Plan:
    """The estimate for a preset on some GPUs; all seconds are per step."""

    gpu: str
    gpus: int
    precision: str
    share: float
    """Share of the card's peak that the arithmetic reaches."""
    measured: bool
    """Whether that share was measured on such a card."""
    arithmetic: float
    """Seconds of convolutions and matrix products."""
    memory: float
    """Seconds in which the activations cross the memory."""
    gather: float
    """Seconds to make a batch from resident images."""
    sent: int
    """Bytes of gradients that the ranks sum up."""
    network: float
    """Seconds of the all-reduces, overlapped or not."""
    communication: float
    """Seconds of them that do not overlap with computation."""
    step: float
    """Seconds in all."""
    images_per_second: float
    efficiency: float
    """Images/s per card, relative to a card alone."""
    hours: float
    kwh: float
    limit: str
    """The largest part: compute, memory, images or network."""
    fits: bool
    """Whether a card holds its part of the batch."""


def plan(
    model: ModelConfig,
    train: TrainConfig,
    cluster: Cluster,
    *,
    images: int,
    share: float | None = None,
    measured: bool = False,
) -> Plan:
    """Estimate a training run.

    Args:
        model: The nets.
        train: Settings; `train.batch_size` counts the images per card and step.
        cluster: The cards and their links.
        images: Images that the run sees.
        share: Share of the peak that a step reaches, above 0 and up to 1; None takes the one of ASSUMED.
        measured: Whether `share` was measured, for the plan.

    Raises:
        UserError: `share` is out of range.
    """
    if share is not None and not 0 < share <= 1:
        raise UserError(f"share is {share}; accepted: above 0 and up to 1")
    card, gpus, batch = GPUS[cluster.gpu], cluster.gpus, train.batch_size
    share = ASSUMED[card.precision] if share is None else share
    width = 4 if card.precision == "float32" else 2  # bytes of an activation
    cost = step_cost(model, train)
    moved = PASSES * cost.kept * batch * width // 4  # step_cost counts float32
    gathered = batch * 3 * model.size**2 * (1 + width)  # uint8 read, activations written
    arithmetic = cost.flops / (share * card.peak)
    memory = moved / (COPY_SHARE * card.memory)
    gather = gathered / (COPY_SHARE * card.memory)
    work = max(arithmetic, memory)  # the GPU computes while it loads
    # gradients are float32
    reduce_g = cluster.all_reduce(4 * cost.generator)
    reduce_d = cluster.all_reduce(4 * (cost.parameters - cost.generator))
    reduce_losses = cluster.all_reduce(_LOSSES)
    # G's gradients are summed up while D still works on x; D's and the losses come when all else is done
    communication = reduce_d + reduce_losses + max(0.0, reduce_g - work * cost.after_generator / cost.flops)
    network = reduce_g + reduce_d + reduce_losses
    alone = work + gather + _LAUNCH
    step = alone + communication
    parts = {"compute": arithmetic, "memory": memory, "images": gather, "network": network}
    rate = gpus * batch / step
    hours = images / rate / 3600
    # half precision halves the activations, but weights and optimizer state stay float32
    needed = cost.memory - (0 if width == 4 else cost.kept * batch // 2)
    return Plan(
        gpu=card.name,
        gpus=gpus,
        precision=card.precision,
        share=share,
        measured=measured,
        arithmetic=arithmetic,
        memory=memory,
        gather=gather,
        sent=4 * cost.parameters,
        network=network,
        communication=communication,
        step=step,
        images_per_second=rate,
        efficiency=alone / step,
        hours=hours,
        kwh=hours * gpus * card.watts / 1e3,
        limit=max(parts, key=lambda name: parts[name]),
        fits=needed < 0.9 * card.capacity,
    )


def all_reduce_seconds(size: int, ranks: int, bandwidth: float, latency: float) -> float:
    """Model an all-reduce as a ring, or as a tree where that is faster.

    Args:
        size: Bytes.
        ranks: Number of ranks.
        bandwidth: Bytes/s between two ranks, each way.
        latency: Seconds from a rank to the next.

    Returns:
        Seconds.
    """
    if ranks == 1:
        return 0.0
    ring = 2 * (ranks - 1) / ranks * size / bandwidth + 2 * (ranks - 1) * latency
    tree = 2 * size / bandwidth + 2 * math.ceil(math.log2(ranks)) * latency
    return min(ring, tree)


def measured_share(folder: Path, gpu: str) -> float | None:
    """The largest share of the card's peak that a step reached in the results of `folder`; None where there are none.

    `folder` holds JSON files of `pytest bench/`; only those measured on card `gpu` (a key of GPUS) count.
    """
    card, best = GPUS[gpu], 0.0
    for path in sorted(folder.glob("*.json")):
        results = Results.load(path)
        if gpu.upper() not in results.machine["device"].upper():
            continue
        for row in results.rows:
            if row.group == "step" and row.flops and row.precision == card.precision:
                best = max(best, 1e3 * row.flops / row.ms / card.peak)
    return best or None
