"""Metrics that leave the device while it works on: rows may come late, but none is lost and none is another."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbegan import ModelConfig, TrainConfig
from fastbegan.display import Display
from fastbegan.runs.checkpoint import list_checkpoints
from fastbegan.runs.folder import RunConfig, RunFolder
from fastbegan.training.loop import NOT_FINITE, StopRequest, Training
from fastbegan.training.reading import Reading

SHORT = TrainConfig(
    data="faces:64",
    batch_size=8,
    steps=20,
    log_every=5,
    sample_every=15,
    checkpoint_every=1000,
    device="cpu",
    precision="float32",
)


def _run(out: Path, prepare: Callable[[Training], None] = lambda training: None, **changes: Any) -> int:
    config = RunConfig("demo", ModelConfig(size=32, filters=4), replace(SHORT, **changes))
    with Display() as display:
        training = Training(config, out, resume=True, display=display)
        prepare(training)
        return training.run(StopRequest())


def _rows(out: Path) -> list[dict[str, Any]]:
    clocked = ("images_per_second", "data_wait")
    return [{k: v for k, v in row.items() if k not in clocked} for row in RunFolder(out).read_metrics()]


def test_a_reading_is_of_the_moment_it_began() -> None:
    numbers = torch.tensor([1.0, 2.0])
    reading = Reading(numbers)
    numbers.zero_()
    assert reading.arrived() and reading.values() == [1.0, 2.0]


@pytest.fixture(scope="module")
def prompt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose rows arrive at once."""
    out = tmp_path_factory.mktemp("prompt") / "run"
    assert _run(out) == 0
    return out


@pytest.mark.parametrize("delay", [3, 1000])
def test_late_rows_are_the_same_rows(prompt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, delay: int) -> None:
    """Rows are written when they arrive, or at last where someone waits: the next row, a sheet, the end."""
    asked: dict[int, int] = {}
    late: list[int] = []
    write = RunFolder.append_metrics

    def arrived(reading: Reading) -> bool:
        asked[id(reading)] = asked.get(id(reading), 0) + 1
        return asked[id(reading)] > delay

    def watch(training: Training) -> None:
        def append(folder: RunFolder, row: dict[str, Any]) -> None:
            late.append(training.progress.done - row["step"])
            write(folder, row)

        monkeypatch.setattr(RunFolder, "append_metrics", append)
        monkeypatch.setattr(Reading, "arrived", arrived)

    assert _run(tmp_path / "late", watch) == 0
    assert _rows(tmp_path / "late") == _rows(prompt)
    assert late == ([0, 2, 0, 0] if delay == 3 else [0, 5, 0, 0])  # sheets are at 5, 15 and 20


def test_a_checkpoint_waits_for_the_row_and_for_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Reading, "arrived", lambda reading: False)
    rows_at: list[int] = []

    def watch(training: Training) -> None:
        save = training.checkpoints.save

        def checkpoint(step: int, state: Callable[[], dict[str, Any]]) -> None:
            rows_at.append(len(RunFolder(tmp_path / "run").read_metrics()))
            save(step, state)

        monkeypatch.setattr(training.checkpoints, "save", checkpoint)

    assert _run(tmp_path / "run", watch, sample_every=1000, checkpoint_every=7) == 0
    assert rows_at == [1, 2, 4]  # at 7, 14 and 20: those of 5; of 10; of 15 and 20

    def poison(training: Training) -> None:
        sound = training.loader.current
        spoilt = lambda position: sound(position) * (float("nan") if position == 8 * 5 else 1)  # noqa: E731
        monkeypatch.setattr(training.loader, "current", spoilt)

    assert _run(tmp_path / "bad", poison, sample_every=1000, checkpoint_every=7, log_every=10) == NOT_FINITE
    assert not list_checkpoints(tmp_path / "bad" / "checkpoints")


def test_images_a_second_are_of_the_row_and_of_training_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])

    def slow(training: Training) -> None:
        advance, save, draw = training.advance, training.checkpoints.save, training.sheets.draw
        monkeypatch.setattr(advance, "work", lambda work=advance.work: (work(), now.__setitem__(0, now[0] + 0.5)))
        monkeypatch.setattr(training.checkpoints, "save", lambda *a: (save(*a), now.__setitem__(0, now[0] + 70)))
        sheet = lambda step: (now.__setitem__(0, now[0] + 30), draw(step))[1]  # noqa: E731
        monkeypatch.setattr(training.sheets, "draw", sheet)

    assert _run(tmp_path / "run", slow, checkpoint_every=7) == 0
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert [row["images_per_second"] for row in rows] == [16.0] * 4  # 8 images in half a second


def test_numbers_that_are_not_finite_are_seen_when_they_arrive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def poison(training: Training) -> None:
        sound = training.loader.current
        spoilt = lambda position: sound(position) * (float("nan") if position == 8 * 6 else 1)  # noqa: E731
        monkeypatch.setattr(training.loader, "current", spoilt)
        monkeypatch.setattr(Reading, "arrived", lambda reading: False)

    assert _run(tmp_path / "run", poison, sample_every=1000) == NOT_FINITE
    assert [row["step"] for row in _rows(tmp_path / "run")] == [5]
