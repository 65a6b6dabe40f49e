"""What a run computes with on a CPU: measured, said, and kept with the run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fastbegan import PRESETS, ModelConfig, TrainConfig
from fastbegan.display import Display
from fastbegan.distributed.stop import StopRequest
from fastbegan.runs.checkpoint import load_latest
from fastbegan.runs.folder import RunConfig, RunFolder
from fastbegan.training import fastest as measuring
from fastbegan.training import place as places
from fastbegan.training.fastest import Fastest, fastest
from fastbegan.training.loop import Training, train

CPU = torch.device("cpu")
DEMO = PRESETS["demo"]
TINY = ModelConfig(size=16, filters=4, hidden=8, latent=8, widths=(1, 1))


class _Clock:
    """Time that only steps take."""

    def __init__(self) -> None:
        self.now = 0.0
        self.batches: list[int] = []

    def step(self, train: TrainConfig, precision: str, seconds: dict[tuple[str, str], float]) -> Callable[[], None]:
        def advance() -> None:
            self.now += seconds[train.passes, precision]
            self.batches.append(train.batch_size)

        return advance


def _choose(
    monkeypatch: pytest.MonkeyPatch, train: TrainConfig, seconds: dict[str, float], *, bf16: bool = True
) -> Any:
    clock = _Clock()
    table = {
        (name.split("_")[0].replace("single", "single-pass"), name.split("_")[1]): s for name, s in seconds.items()
    }
    monkeypatch.setattr(measuring, "_step", lambda _, train, precision, __: clock.step(train, precision, table))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock.now)
    monkeypatch.setattr(measuring, "has_native_bf16", lambda _: bf16)
    chosen = fastest(DEMO.model, train, CPU)
    return chosen, clock


def test_the_fastest_is_taken_and_noise_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    times = {"joint_float32": 0.040, "single_float32": 0.042, "joint_bf16": 0.039, "single_bf16": 0.050}
    chosen, clock = _choose(monkeypatch, DEMO.train, times)
    assert (chosen.passes, chosen.precision, chosen.seconds) == ("joint", "float32", pytest.approx(0.040))
    assert chosen.line == (
        "float32 joint 40, float32 single-pass 42, bf16 joint 39, bf16 single-pass 50 ms a step, before compilation"
    )
    assert clock.now < 4 and set(clock.batches) == {16}
    chosen, _ = _choose(monkeypatch, DEMO.train, times | {"single_bf16": 0.030})
    assert (chosen.passes, chosen.precision) == ("single-pass", "bf16")
    chosen, _ = _choose(monkeypatch, DEMO.train, times | {"single_bf16": 0.030}, bf16=False)
    assert (chosen.passes, chosen.precision) == ("joint", "float32")


def test_what_was_asked_for_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    slow = {"joint_float32": 0.1, "single_float32": 0.1, "joint_bf16": 0.3, "single_bf16": 0.2, "textbook_bf16": 0.4}
    asked = replace(DEMO.train, precision="bf16")
    chosen, _ = _choose(monkeypatch, asked, slow)
    assert (chosen.passes, chosen.precision) == ("single-pass", "bf16")
    chosen, _ = _choose(monkeypatch, replace(asked, passes="textbook"), slow)
    assert (chosen.passes, chosen.precision, chosen.seconds) == ("textbook", "bf16", pytest.approx(0.4))
    assert _choose(monkeypatch, replace(asked, passes="joint", compile="off"), slow)[0] is None  # nothing is open
    assert _choose(monkeypatch, replace(DEMO.train, steps=20), slow)[0] is None  # over before it is measured


def test_a_large_step_is_measured_with_fewer_images(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = _Clock()
    monkeypatch.setattr(measuring, "_step", lambda _, train, precision, __: clock.step(train, precision, _Same()))
    monkeypatch.setattr(measuring.time, "perf_counter", lambda: clock.now)
    preset = PRESETS["paper-64"]
    chosen = fastest(preset.model, preset.train, CPU)
    assert chosen is not None and set(clock.batches) == {1} and chosen.seconds == pytest.approx(0.25 * 16)
    assert clock.now <= 4 * 0.25 + 3 + 4 * 0.25  # a turn to warm up, and one that begins just before the end


class _Same(dict[Any, float]):
    def __missing__(self, _: object) -> float:
        return 0.25


def test_real_steps_are_timed() -> None:
    settings = replace(DEMO.train, images=None, minutes=5.0)
    chosen = fastest(TINY, settings, CPU)
    assert chosen is not None and 0 < chosen.seconds < 1 and chosen.passes in ("joint", "single-pass")


def test_the_choice_is_said_and_kept(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[TrainConfig] = []

    def measured(model: ModelConfig, train: TrainConfig, device: torch.device, world: int) -> Fastest:
        asked.append(train)
        return Fastest("joint", "bf16" if len(asked) == 1 else "float32", 1e-3, "one 1, another 2 ms a step")

    monkeypatch.setattr(places, "fastest", measured)
    config = TrainConfig(data="faces:32", batch_size=8, device="cpu", steps=2)
    assert train(RunConfig("demo", TINY, config), tmp_path / "run") == 0
    said = capsys.readouterr().out
    assert "measured   one 1, another 2 ms a step" in said and "; bf16" in said and "joint: D once per batch" in said
    stored = RunFolder(tmp_path / "run").read_config().train
    assert (stored.precision, stored.passes, stored.compile) == ("bf16", "joint", "auto")
    state = load_latest(tmp_path / "run" / "checkpoints", CPU)
    assert state is not None and state["compile"] == "off"

    assert train(RunConfig("demo", TINY, config), tmp_path / "run") == 0  # of the same length: nothing is measured
    assert len(asked) == 1 and "bf16" in capsys.readouterr().out
    assert train(RunConfig("demo", TINY, replace(config, steps=4)), tmp_path / "run") == 0
    assert len(asked) == 2 and asked[1].precision == "bf16" and asked[1].passes == "joint"  # what is left is to compile


def test_a_deterministic_run_is_the_same_everywhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(places, "fastest", lambda *_: pytest.fail("measured"))
    config = TrainConfig(data="faces:32", batch_size=8, device="cpu", steps=2, deterministic=True)
    with Display(quiet=True) as display:
        training = Training(RunConfig("demo", TINY, config), tmp_path / "run", resume=False, display=display)
    assert (training.config.train.precision, training.config.train.passes) == ("float32", "single-pass")
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(("before", "mode"), [("off", None), ("default", "default")])
def test_compilation_is_kept(before: str, mode: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbegan.distributed.ranks import Ranks

    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    settings = replace(DEMO.train, precision="float32")
    place = places.choose(DEMO.model, settings, CPU, Ranks(), before)
    assert place.compile_mode == mode and place.measured_line == ""
    assert place.compile_line == f"compile {before} (as the run began)"
    monkeypatch.setattr("shutil.which", lambda name: None)  # it goes on where nothing can be compiled
    assert places.choose(DEMO.model, settings, CPU, Ranks(), before).compile_mode is None


def test_a_run_whose_rate_falls_continues_bit_for_bit(tmp_path: Path) -> None:
    settings = TrainConfig(data="faces:32", batch_size=8, device="cpu", steps=12, lr=1e-3, lr_fall=0.5, log_every=3)
    config = RunConfig("demo", TINY, replace(settings, precision="float32", passes="joint"))
    assert train(config, tmp_path / "whole") == 0
    with Display(quiet=True) as display:
        training = Training(config, tmp_path / "parts", resume=True, display=display)
        training.begin()
        for _ in range(8):
            assert training.go_on(StopRequest())
        training.checkpoints.save(8, training.state)
        training.checkpoints.finish()
    assert train(config, tmp_path / "parts") == 0
    rows = [RunFolder(tmp_path / name).read_metrics() for name in ("whole", "parts")]
    rates = [[row["lr"] for row in run] for run in rows]
    assert rates[0] == pytest.approx([1e-3, 1e-3, 1e-3 - 0.5 * 9.8e-4, 2e-5]) and rates[1] == rates[0]
    states = [load_latest(tmp_path / name / "checkpoints", CPU) for name in ("whole", "parts")]
    assert states[0] is not None and states[1] is not None
    for name, value in states[0]["modules"].items():
        assert torch.equal(states[1]["modules"][name], value), name
