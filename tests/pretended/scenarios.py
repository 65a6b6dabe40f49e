"""Ways to train, each captured and stepped on a pretended device: prints a row of JSON for each that is named.

`python -m tests.pretended.scenarios NAME ...` in the environment of `running.pretended`; without names: all.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastbegan.config import ModelConfig, TrainConfig
from fastbegan.counter import Z_D, Z_G, latents
from fastbegan.data.loader import Batching, PackedLoader, ResidentLoader
from fastbegan.device import pick_precision
from fastbegan.nets.models import build
from fastbegan.training.graph import GraphedStep
from fastbegan.training.reading import Reading
from fastbegan.training.step import TrainStep

from .findings import FINDINGS, PAGEABLE

DEVICE = torch.device("cuda")
IMAGES = np.random.default_rng(0).integers(0, 256, (7, 18, 18, 3), np.uint8)
STEPS, READ, POISONED, STEADY = 8, 5, 6, 8  # three steps warm up, the fourth is captured; an epoch begins in the last
_MODEL = {"size": 16, "filters": 4, "hidden": 8, "latent": 8, "widths": (1, 2), "repeats": 1}
_LOADERS = {"resident": ResidentLoader, "packed": PackedLoader}


@dataclass(frozen=True)
class Variant:
    """What differs from the default."""

    train: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    precision: str = "float32"
    loader: str = "resident"
    loss_scale: float | None = None
    poisoned: bool = False  # k becomes NaN after some steps


def _train(precision: str = "float32", **options: Any) -> Variant:
    return Variant(options, precision=precision)


VARIANTS = {
    "default": Variant(),
    "joint": _train(passes="joint"),
    "textbook": _train(passes="textbook"),
    "alternating": _train(updates="alternating"),
    "independent": _train(latents="independent"),
    "alternating independent": _train(updates="alternating", latents="independent"),
    "joint alternating": _train(passes="joint", updates="alternating"),
    "textbook alternating independent": _train(passes="textbook", updates="alternating", latents="independent"),
    "eta 2": _train(eta=2),
    "accumulate": _train(accumulate=2),
    "accumulate joint": _train(accumulate=2, passes="joint"),
    "recompute": _train(recompute=True),
    "vanishing": Variant({"carry_steps": 4}, {"vanishing": True}),
    "no skips": Variant({}, {"skips": False}),
    "packed": Variant(loader="packed"),
    "tf32": _train("tf32"),
    "bf16": _train("bf16"),
    "bf16 joint": _train("bf16", passes="joint"),
    "bf16 textbook": _train("bf16", passes="textbook"),
    "fp16": _train("fp16"),
    "fp16 of 8": Variant({}, {"filters": 8}, "fp16"),  # channels enough for descriptors
    "fp16 joint": _train("fp16", passes="joint"),
    "fp16 textbook": _train("fp16", passes="textbook"),
    "fp16 packed alternating": Variant({"updates": "alternating"}, precision="fp16", loader="packed"),
    "fp16 overflow": Variant(precision="fp16", loss_scale=2.0**30),
    "fp16 hopeless": Variant(precision="fp16", loss_scale=1.5, poisoned=True),
    "not finite": Variant(poisoned=True),
    "not finite alternating": Variant({"updates": "alternating"}, poisoned=True),
}


@dataclass
class Ended:
    """What a few steps left, and what the device saw in one of the last."""

    state: dict[str, Tensor]
    moments: list[Tensor]
    read: list[float]
    captured: bool
    steady: list[str]


def steps(variant: Variant, *, graphed: bool) -> Ended:
    """Train for a few steps as `fastbegan.training.loop` does."""
    model = ModelConfig(**(_MODEL | variant.model))
    config = TrainConfig(batch_size=2, lr=1e-3, **variant.train)
    step = TrainStep(*build(model, seed=0, device=DEVICE), config, pick_precision(variant.precision, DEVICE)[1])
    if variant.loss_scale:
        step.loss_scale.fill_(variant.loss_scale)
    loader = _LOADERS[variant.loader](IMAGES, Batching(2, 16, seed=0, jitter=1, device=DEVICE))

    def work() -> None:
        position = step.number * 2
        z_d = z_g = latents(0, Z_D, position, 2, model.latent, DEVICE)
        if config.latents == "independent":
            z_g = latents(0, Z_G, position, 2, model.latent, DEVICE)
        step(loader.current(position), z_d, z_g)

    advance = GraphedStep(work, DEVICE, enabled=graphed)
    read, steady = list[float](), list[str]()
    reading: Reading | None = None
    for number in range(1, STEPS + 1):
        before = FINDINGS.snapshot()
        loader.prepare(2 * (number - 1))
        prepared = [line for line in FINDINGS.since(before) if PAGEABLE in line]  # from pinned memory it may copy
        if variant.poisoned and number == POISONED:
            step.equilibrium.k.fill_(float("nan"))
        before = FINDINGS.snapshot()
        advance()
        if number == STEADY:
            steady = prepared + FINDINGS.since(before)
        if number == READ:
            step.set_lr(5e-4)
            reading = step.begin_reading()
        if number == READ + 1 and reading is not None:
            read = reading.values()
    torch.cuda.synchronize()
    state = {name: value.cpu().clone() for name, value in step.state_dict().items()}
    optimizers = (step.optimizer_d, step.optimizer_g)
    moments = [value.cpu() for one in optimizers for kept in one.state.values() for value in kept.values()]
    ended = Ended(state, moments, read, advance.captured, steady)
    advance.close()
    return ended


def compare(name: str) -> dict[str, Any]:
    """A row of what is to be known of a variant; `kernels` are those of all variants so far."""
    start, before = time.process_time(), FINDINGS.snapshot()
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        stepped, graphed = steps(VARIANTS[name], graphed=False), steps(VARIANTS[name], graphed=True)
    same = {key: _equal(value, graphed.state[key]) for key, value in stepped.state.items()}
    moments = zip(stepped.moments, graphed.moments, strict=True)
    errors = [key for key, value in stepped.state.items() if value.is_floating_point() and not value.isfinite().all()]
    return {
        "name": name,
        "captured": graphed.captured and not stepped.captured,
        "differ": [key for key, equal in same.items() if not equal],
        "moments that differ": sum(not _equal(*pair) for pair in moments),
        "rows": [stepped.read, graphed.read],
        "not finite": errors,
        "steady": graphed.steady,
        "errors": FINDINGS.errors_since(before),
        "warnings": sorted({str(one.message) for one in heard}),
        "bad": bool(graphed.state["found_bad"]),
        "loss scale": graphed.state["loss_scale"].item(),
        "kernels": sorted(FINDINGS.launches),
        "seconds": round(time.process_time() - start, 1),
    }


def _equal(one: Tensor, other: Tensor) -> bool:
    """The same bits, but any NaN for any other."""
    return torch.equal(one, other) or bool(((one == other) | (one.isnan() & other.isnan())).all())


if __name__ == "__main__":
    from fastbegan_kernels.fused import fold

    fold._FOLD_BLOCK = 1024  # few programs, which the interpreter takes one after another
    for each in sys.argv[1:] or VARIANTS:
        print(json.dumps(compare(each)), flush=True)
