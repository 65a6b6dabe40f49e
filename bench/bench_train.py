"""Images a second of `fastbegan train`: steps with their batches and metrics, without sheets and checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastbegan.config import PRESETS
from fastbegan.display import Display
from fastbegan.measure.results import Row
from fastbegan.runs.folder import RunConfig
from fastbegan.training.loop import Training

STEPS = 10  # a turn


def bench_train(race: Callable[..., Row], tmp_path: Path) -> None:
    preset = PRESETS["demo"]
    runs: dict[str, Training] = {}
    with Display() as display:
        for passes in ("single-pass", "textbook"):
            train = replace(preset.train, passes=passes, data="faces:512", images=None, steps=1, cuda_graph="auto")
            config = RunConfig("demo", preset.model, train)
            runs[passes] = Training(config, tmp_path / passes, resume=False, display=display)

        def turn(training: Training) -> Callable[[], None]:
            def work() -> None:
                for _ in range(STEPS):
                    training.advance_one()
                training.step.equilibrium.read()

            return work

        batch = preset.train.batch_size
        row = Row("train", "demo, 10 steps with their metrics", images=STEPS * batch)
        race(row, {"single-pass": turn(runs["single-pass"]), "textbook": turn(runs["textbook"])})
