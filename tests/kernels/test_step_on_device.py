"""Whole steps, batches and long runs on the device: on a GPU graphs replay them, on a CPU they run one by one."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fastbegan.config import ModelConfig, TrainConfig
from fastbegan.data.loader import Batching, Loader, PackedLoader, ResidentLoader
from fastbegan.device import pick_precision, set_backends
from fastbegan.measure.step import inputs
from fastbegan.nets.models import build
from fastbegan.training.graph import GraphedStep
from fastbegan.training.step import TrainStep

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
PRECISION = "bf16" if ON_GPU else "float32"
SIZE, FILTERS, STEPS = (64, 64, 10_000) if ON_GPU else (32, 4, 20)


def _step(*, graph: bool = True, **options: Any) -> tuple[TrainStep, GraphedStep]:
    """A step in the device's fastest precision, and how to advance it; deterministic, so that no form is measured."""
    set_backends(PRECISION, deterministic=True)
    model, train = ModelConfig(size=SIZE, filters=FILTERS), TrainConfig(**options)
    real, z = inputs(model, train, DEVICE)
    step = TrainStep(*build(model, seed=0, device=DEVICE), train, pick_precision(PRECISION, DEVICE)[1])
    return step, GraphedStep(lambda: step(real, z, z), DEVICE, enabled=graph)


@pytest.mark.parametrize(
    ("passes", "updates"), [("single-pass", "simultaneous"), ("joint", "simultaneous"), ("single-pass", "alternating")]
)
def test_replayed_steps_equal_single_steps(passes: str, updates: str) -> None:
    steps = []
    for graph in (False, True):
        step, advance = _step(graph=graph, passes=passes, updates=updates)
        for _ in range(8 if ON_GPU else 2):
            advance()
        assert advance.captured == (graph and ON_GPU)
        steps.append(step)
    assert all(map(torch.equal, *(list(step.parameters()) for step in steps)))


@pytest.mark.parametrize("kind", [PackedLoader, ResidentLoader])
def test_batches_in_a_graph_are_those_of_a_cpu(kind: type[Loader]) -> None:
    images: Any = np.random.default_rng(0).integers(0, 256, (70, 36, 36, 3), np.uint8)
    options: dict[str, Any] = {"batch_size": 16, "size": 32, "seed": 0, "jitter": 2}
    exact, loader = PackedLoader(images, Batching(**options)), kind(images, Batching(**options, device=DEVICE))  # pyright: ignore
    position, out = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.empty(16, 3, 32, 32, device=DEVICE)

    def work() -> None:
        out.copy_(loader.current(position))
        position.add_(16)

    loader.prepare(0)
    advance, batches = GraphedStep(work, DEVICE), []
    for number in range(40):
        loader.prepare(16 * number)
        advance()
        batches.append(out.clone())  # nothing here waits for the device
    assert advance.captured == ON_GPU
    for number, batch in enumerate(batches):
        torch.testing.assert_close(batch.cpu(), exact.batch(16 * number), rtol=0, atol=1e-6)


def test_many_steps_leave_memory_as_it_was_and_a_reading_is_of_its_step() -> None:
    step, advance = _step()
    held, reading = [], None
    for number in range(1, STEPS + 1):
        advance()
        if number == STEPS // 2:
            reading = step.begin_reading()
        if number in (100, STEPS) and ON_GPU:
            torch.cuda.synchronize()
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    assert len(set(held)) == int(ON_GPU)
    assert reading is not None and not step.found_bad.item()
    *_, count, _, _ = reading.values()
    assert count == STEPS // 2  # steps that were queued after it do not count
