"""The paper's experiments: that they run, go on where they were, and (nightly, demo scale) find what they should."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from docs import make_gallery
from fastbegan import ModelConfig
from fastbegan.cli import main
from fastbegan.commands.experiment import EXPERIMENTS
from fastbegan.experiments.continuity import recover
from fastbegan.experiments.convergence import ranks_correlate
from fastbegan.experiments.race import seconds_to, smoothed
from fastbegan.experiments.record import fingerprint
from fastbegan.experiments.scales import SCALES
from fastbegan.experiments.speed import WAYS, minutes_to_levels, ratio_of_minutes
from fastbegan.experiments.study import OF_ONE_RUN
from fastbegan.files import read_json
from fastbegan.nets.models import build
from fastbegan.runs.folder import RunFolder
from fastbegan.runs.sheets import sheet_latents
from tests.helpers.processes import ROOT

Start = Callable[..., "subprocess.Popen[str]"]
NAMES = list(EXPERIMENTS)
AT_LENGTH = {"speed": ["--seeds", "3"]}  # options at demo scale, for `make experiments` and the gallery
TINY_MODEL = ModelConfig(size=16, filters=4, hidden=8, latent=8, widths=(1, 1))


def _results(folder: Path) -> dict[str, Any]:
    """results.json, after a look at the report and the pictures it shows."""
    report = (folder / "report.md").read_text(encoding="utf-8")
    results = json.loads((folder / "results.json").read_text(encoding="utf-8"))
    assert results["command"] in report and "## Limits" in report and "nan" not in report.lower().split()
    pictures = [line.rpartition("](")[2].rstrip(")") for line in report.splitlines() if line.startswith("![")]
    assert pictures
    for name in pictures:
        with Image.open(folder / name) as picture:
            assert np.asarray(picture.convert("RGB")).std() > 5, name
    return results


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_every_experiment_runs(name: str, tmp_path: Path) -> None:
    out = tmp_path / name
    assert main(["experiment", name, "--scale", "smoke", "--seed", "3", "--out", str(out)]) == 0
    results = _results(out)
    assert results["command"] == f"fastbegan experiment {name} --scale smoke --out {out} --seed 3"
    report = (out / "report.md").read_text()
    assert results["checks"] and "show that the experiment works" in report and "32 pixels, n = 4, " in report
    assert all(finding[1:] in report for finding in results["findings"])
    used = (results["settings"]["seeds"] is not None, results["settings"]["extractor"] is not None)
    assert used == (name == "diversity", name != "continuity")
    for run in (out / "runs").iterdir():
        if run.is_dir():
            assert RunFolder(run).read_config().train.seed == 3


@pytest.mark.slow
def test_it_goes_on_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["experiment", "unbalanced", "--scale", "smoke", "--out", str(tmp_path / "e")]
    assert main(command) == 0
    first = _results(tmp_path / "e")
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "e" / "runs").rglob("*") if path.is_file()}
    for name in ("results.json", "report.md", "measures/starved-g.json"):
        (tmp_path / "e" / name).unlink()
    capsys.readouterr()
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "starved-g: " in said and "starved-d: 0:" not in said and "trained" not in said
    again = _results(tmp_path / "e")
    assert again["results"] == first["results"] and again["seconds"] > first["seconds"]
    assert kept == {path: path.stat().st_mtime_ns for path in kept}
    assert main([*command, "--seed", "1"]) == 2
    assert "holds an experiment with other settings" in capsys.readouterr().err
    monkeypatch.setitem(SCALES, "smoke", replace(SCALES["smoke"], steps=21))
    assert main(command) == 2
    assert "holds an experiment with other lengths" in capsys.readouterr().err
    monkeypatch.undo()
    monkeypatch.setattr("fastbegan.experiments.record.fingerprint", lambda: "other")
    assert main(command) == 2
    assert "holds an experiment with other code or device; remove it or" in capsys.readouterr().err
    assert main([*command, "--any-code"]) == 0
    report = (tmp_path / "e" / "report.md").read_text()
    assert "Several versions of the code" in report and "--any-code" in report
    assert main(command) == 2  # that it was allowed once does not make its figures of one piece


@pytest.mark.slow
def test_a_run_that_is_there_is_taken(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    flags = "--filters 4 --data faces:64 --steps 10 --checkpoint-every 2 --keep 9 --log-every 1".split()
    assert main(["train", *flags, "--out", str(run)]) == 0
    shared = ["--scale", "smoke", "--trained", str(run), "--out"]
    for name in OF_ONE_RUN:
        assert main(["experiment", name, *shared, str(tmp_path / name)]) == 0
        assert not list((tmp_path / name / "runs").iterdir())
        assert _results(tmp_path / name)["settings"]["trained"] == str(run)
    for checkpoint in sorted((run / "checkpoints").iterdir())[:2]:
        (checkpoint / "state.pt").unlink()
        (checkpoint / "manifest.json").unlink()
        checkpoint.rmdir()
    capsys.readouterr()
    assert main(["experiment", "convergence", *shared, str(tmp_path / "again")]) == 2
    assert "has 3 checkpoints; accepted: from 5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["diversity", "--seeds", "0"], "seeds is 0 for diversity; accepted: whole numbers from 1"),
        (["scores", "--seeds", "2"], "seeds is 2 for scores"),
        (["scores", "--seed", "-1"], "seed is -1; accepted: whole numbers from 0"),
        (["diversity", "--trained", "x"], "trained is x for diversity; accepted: with continuity"),
        (["scores", "--trained", "x", "--data", "faces"], "data is 'faces' beside trained"),
        (["scores", "--trained", "/nowhere"], "/nowhere is no run folder"),
        (["scores", "--data", "/nowhere"], "data '/nowhere' does not exist"),
        (["scores", "--data", "faces:4"], "run run ended with exit code 2 (error: data 'faces:4' has only 4 images"),
        (["scores", "--inception", "x"], "accepted with --extractor inception"),
        (["scores", "--extractor", "inception"], "extractor 'inception' needs its weights"),
        (["continuity", "--extractor", "inception"], "continuity, which compares no features"),
        (["scores", "--scale", "paper"], "data is missing; at paper scale give --data"),
        (["scores", "--out", "/dev/null"], "/dev/null"),
        (["scores", "--device", "tpu"], "device is 'tpu'"),
    ],
)
def test_bad_input(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["experiment", arguments[0], "--scale", "smoke", *arguments[1:]]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    if "faces:4" not in arguments:
        assert list(tmp_path.iterdir()) == []  # the right input is not met by what the wrong one left


def test_a_folder_with_something_else_is_left_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert main(["experiment", "scores", "--scale", "smoke", "--out", str(tmp_path)]) == 2
    assert "not empty and no experiment" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.slow
def test_a_signal_ends_the_runs_too(tmp_path: Path, start_fastbegan: Start) -> None:
    """At demo scale, where runs take minutes; never to their end here."""
    out = tmp_path / "e"
    command = ("experiment", "scores", "--scale", "demo", "--data", "faces:64", "--device", "cpu", "--out", out)
    for sitting, heard in enumerate(("stopped after", "continued at step")):
        started = start_fastbegan(*command)
        until = time.monotonic() + 400
        while not _rows(out / "runs" / "run") > sitting * 10:
            assert started.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        assert children
        for child in children:  # as systems do that end all processes of a job
            os.kill(int(child), signal.SIGTERM)
        os.kill(started.pid, signal.SIGTERM)
        said = started.communicate(timeout=300)[0]
        assert started.returncode in (2, 130), said  # whichever it sees first
        assert not [child for child in children if Path(f"/proc/{child}").exists()]
        log = (out / "runs" / "run.log").read_text()
        assert heard in log and "interrupted" not in log
        assert not (out / "measures" / "run-run.json").exists() and not (out / "report.md").exists()


@pytest.mark.slow
def test_runs_that_were_left_behind_are_waited_for(tmp_path: Path, start_fastbegan: Start) -> None:
    out = tmp_path / "e"
    command = ("experiment", "scores", "--scale", "demo", "--data", "faces:64", "--device", "cpu", "--out", out)
    first = start_fastbegan(*command)
    until = time.monotonic() + 400
    while not _rows(out / "runs" / "run"):
        assert first.poll() is None and time.monotonic() < until
        time.sleep(0.1)
    (child,) = Path(f"/proc/{first.pid}/task/{first.pid}/children").read_text().split()
    first.kill()
    first.communicate()
    second = start_fastbegan(*command)
    assert second.stdout is not None and "is at work in" in second.stdout.readline()
    assert Path(f"/proc/{child}").exists()
    os.kill(int(child), signal.SIGTERM)
    assert "training run" in second.stdout.readline()  # as soon as that one has ended
    second.send_signal(signal.SIGTERM)
    second.communicate(timeout=300)
    assert second.returncode == 130


def _rows(run: Path) -> int:
    return len(RunFolder(run).read_metrics())


def test_ranks_correlate() -> None:
    assert ranks_correlate(np.array([1.0, 2, 3, 9]), np.array([0.1, 7, 8, 9])) == pytest.approx(1)
    assert ranks_correlate(np.array([1.0, 2, 3]), np.array([3.0, 2, -5])) == pytest.approx(-1)
    # by hand: 1 - 6 * (0 + 1 + 1 + 0 + 0) / (5 * 24)
    assert ranks_correlate(np.array([1.0, 2, 3, 4, 5]), np.array([1.0, 3, 2, 4, 5])) == pytest.approx(0.9)


def test_minutes_to_a_level() -> None:
    assert smoothed([4, 2, 0, 2], 2).tolist() == [4, 3, 1, 1]
    falling = [float(value) for value in range(100, 0, -1)]
    times = [2.0 * number for number in range(1, 101)]
    # the mean of 30 values from v + 29 down to v is v + 14.5: it is 50 at v = 35.5, so at most 50 from v = 35 on
    assert seconds_to(50, times, falling) == times[falling.index(35.0)]
    assert seconds_to(1, times, falling) is None  # the last mean is 15.5
    seconds = {
        "textbook": times,
        "textbook compiled": [30 + 0.9 * t for t in times],
        "ours": [40 + t / 2 for t in times],
    }
    race = {way: {"seconds": seconds[way], "M": falling} for way in WAYS}
    half, whole = minutes_to_levels(race, (0.5, 1.0))
    assert whole == {
        "M": 15.5,
        "textbook": pytest.approx(200 / 60),
        "textbook compiled": pytest.approx(210 / 60),
        "ours": pytest.approx(140 / 60),
    }
    assert half["M"] == 65.5 and half["ours"] == pytest.approx((40 + 50) / 60)
    stuck = race | {"ours": {"seconds": times, "M": [100.0] * 100}}
    assert minutes_to_levels(stuck, (1.0,))[0]["ours"] is None
    assert ratio_of_minutes({"ours": 3.0, "textbook": 6.0}, "textbook", 7) == (0.5, "0.5")
    assert ratio_of_minutes({"ours": 3.5, "textbook": None}, "textbook", 7) == (0.5, "under 0.5")
    assert ratio_of_minutes({"ours": None, "textbook": 6.0}, "textbook", 7) == (None, "not reached")


def test_latents_are_recovered_inside_the_cube() -> None:
    generator = build(TINY_MODEL, seed=0)[0].requires_grad_(False)
    true, start = (sheet_latents(TINY_MODEL.latent, seed, 6) for seed in (1, 2))
    images = generator(true)
    found = recover(generator, images, start, 150)
    assert found.abs().max() <= 1 and not found.requires_grad
    error = lambda z: (images - generator(z)).abs().flatten(1).mean(1)  # noqa: E731
    assert (error(found) < 0.5 * error(start)).all()
    # of all that a latent was, the nearest counts: more steps are never worse, and none changes nothing
    assert torch.equal(recover(generator, images, true, 5), true)
    far = recover(generator, images + 10, start, 20)  # beyond what G can draw: the search runs into the walls
    assert far.abs().max() == 1


@pytest.mark.nightly
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", NAMES)
def test_at_demo_scale(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In experiments/, which is gone on with: what the same code has trained and measured there already counts."""
    monkeypatch.chdir(ROOT)
    folder = ROOT / "experiments" / f"{name}-demo"
    if folder.exists() and fingerprint() not in json.dumps(read_json(folder / "study.json")["made_by"]):
        older = folder.with_name(f"{folder.name}.old")  # kept until the next time
        shutil.rmtree(older, ignore_errors=True)
        folder.rename(older)
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    assert main(["experiment", name, "--scale", "demo", *AT_LENGTH.get(name, ())]) == 0
    results = _results(folder)
    assert results["seconds"] < (600 if name != "speed" else 3 * 1800)
    assert [one for one in results["checks"] if not one["holds"]] == []


def test_the_gallery_is_what_lies_in_it() -> None:
    assert sorted(path.name for path in make_gallery.GALLERY.iterdir() if path.is_dir()) == sorted(
        [*make_gallery.RUNS, *make_gallery.ORDER]
    )
    page = (make_gallery.GALLERY / "README.md").read_text(encoding="utf-8")
    assert page == make_gallery.page()
    for target in re.findall(r"\]\(([^)]+)\)", page):
        assert (make_gallery.GALLERY / target).exists(), target
    for name in make_gallery.ORDER:
        results = _results(make_gallery.GALLERY / name)
        command = ["fastbegan", "experiment", name, "--scale", "demo", *AT_LENGTH.get(name, ())]
        assert results["command"].removesuffix(" --any-code") == " ".join(command)
    assert sum(path.stat().st_size for path in make_gallery.GALLERY.rglob("*")) < 6e6
