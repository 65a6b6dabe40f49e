"""`--log`: each row of metrics.jsonl and each sheet goes to each logger once, over the run's continuation too."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastbegan.cli import main
from fastbegan.runs.folder import RunFolder

Run = Callable[..., Any]
FLAGS = (
    "train --size 16 --widths 1 2 --repeats 1 --filters 2 --hidden 4 --latent 4 --data faces:16 --batch-size 4 "
    "--device cpu --precision float32 --passes joint --compile off --log-every 3 --sample-every 6 --checkpoint-every 5"
).split()


class _Wandb(types.ModuleType):
    """Stands for the package, and keeps what it is given."""

    def __init__(self) -> None:
        super().__init__("wandb")
        self.errors = types.SimpleNamespace(Error=type("Error", (Exception,), {}))
        self.inits: list[dict[str, Any]] = []
        self.logged: list[dict[str, Any]] = []
        self.metrics: list[tuple[str, str]] = []
        self.finished = 0
        self.refusal, self.breaks_after, self.exit_code = "", -1, -1

    def init(self, **settings: Any) -> Any:
        if self.refusal:
            raise self.errors.Error(self.refusal)
        self.inits.append(settings)
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        self.metrics.append((name, step_metric))

    def log(self, values: dict[str, Any]) -> None:
        if len(self.logged) == self.breaks_after:
            raise BrokenPipeError("the service has died")
        self.logged.append(values)

    def finish(self, exit_code: int) -> None:
        self.finished += 1
        self.exit_code = exit_code

    @staticmethod
    def Image(file: str) -> tuple[str, str]:
        return "image", file


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> _Wandb:
    module = _Wandb()
    monkeypatch.setitem(sys.modules, "wandb", module)
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    return module


def test_wandb_gets_the_rows_of_metrics_and_the_sheets(tmp_path: Path, wandb: _Wandb) -> None:
    out = tmp_path / "mine"
    for steps in (10, 20):  # the second continues at 10
        assert main([*FLAGS, "--steps", str(steps), "--log", "wandb", "--out", str(out)]) == 0
    folder = RunFolder(out)
    rows = [values for values in wandb.logged if "samples" not in values]
    sheets = [values for values in wandb.logged if "samples" in values]
    assert rows == folder.read_metrics() and [row["step"] for row in rows] == [3, 6, 9, 10, 12, 15, 18, 20]
    assert sheets == [
        {"step": step, "samples": ("image", str(folder.sheet_file(step)))} for step in (3, 6, 10, 12, 18, 20)
    ]
    first, second = wandb.inits
    assert first["id"] == second["id"] and first["resume"] == "allow"
    assert (first["name"], first["project"], first["dir"]) == ("mine", "fastbegan", str(out))
    assert first["config"]["train"]["batch_size"] == 4
    assert wandb.metrics == [("*", "step")] * 2 and wandb.finished == 2
    assert wandb.exit_code == 0


@pytest.mark.filterwarnings("default:wandb failed")
def test_a_logger_that_fails_does_not_end_the_run(
    tmp_path: Path, wandb: _Wandb, capsys: pytest.CaptureFixture[str]
) -> None:
    wandb.breaks_after = 3
    assert main([*FLAGS, "--steps", "20", "--log", "tensorboard,wandb", "--out", str(tmp_path)]) == 0
    warning = "warning: wandb failed, going on without it: BrokenPipeError the service has died\n"
    assert capsys.readouterr().err.count(warning) == 1
    assert len(wandb.logged) == 3 and wandb.finished == 0
    assert [row["step"] for row in RunFolder(tmp_path).read_metrics()][-1] == 20


def test_a_run_that_fails_is_a_failed_one(tmp_path: Path, wandb: _Wandb, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("fastbegan.training.sheets.Sheets.draw", fail)
    assert main([*FLAGS, "--steps", "20", "--log", "wandb", "--out", str(tmp_path)]) == 130
    assert (wandb.finished, wandb.exit_code) == (1, 1)


def test_a_logger_that_refuses_is_one_line(
    tmp_path: Path, wandb: _Wandb, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb.refusal = "api_key not configured"
    assert main([*FLAGS, "--steps", "4", "--log", "wandb", "--out", str(tmp_path / "a")]) == 2
    assert "error: wandb cannot start (api_key not configured); `wandb login`, or" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([*FLAGS, "--steps", "4", "--log", "wandb", "--out", str(tmp_path / "b")]) == 2
    message = "error: --log wandb needs the package wandb: pip install 'fastbegan[wandb]'\n"
    assert capsys.readouterr().err == message and not (tmp_path / "b").exists()
    for names in ("tensorbord", "wandb,wandb", "wandb,"):
        assert main([*FLAGS, "--steps", "4", "--log", names, "--out", str(tmp_path / "c")]) == 2
        accepted = "accepted: tensorboard or wandb or both with a comma between"
        assert capsys.readouterr().err == f"error: log is {names!r}; {accepted}\n"


def test_tensorboard_has_the_rows_and_the_sheets(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for steps in ("6", "12"):
        assert main([*FLAGS, "--steps", steps, "--log", "tensorboard", "--out", str(tmp_path / "run")]) == 0
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    rows = RunFolder(tmp_path / "run").read_metrics()
    for name in ("loss_real", "loss_fake", "k", "convergence", "lr"):
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [(row["step"], pytest.approx(row[name])) for row in rows]
    assert [image.step for image in events.Images("samples")] == [3, 6, 12]


@pytest.mark.slow
def test_wandb_offline_leaves_its_folder(tmp_path: Path, fastbegan: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    out = tmp_path / "run"
    done = fastbegan(*FLAGS, "--steps", 6, "--log", "tensorboard,wandb", "--out", out)
    assert done.returncode == 0, done.stderr
    (folder,) = (out / "wandb").glob("offline-run-*")
    assert list(folder.glob("run-*.wandb")) and list((out / "tensorboard").iterdir())
    assert (out / "wandb" / "id").read_text() in folder.name
