"""The command line: its surface, its errors, and how little importing it does."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

from fastbegan import TrainStep
from fastbegan.cli import _expanded, main
from fastbegan.runs.folder import RunFolder
from tests.helpers.processes import environment

TRAIN_OPTIONS = (
    "accumulate batch-size beta1 carry-steps checkpoint-every compile crop cuda-graph cudnn-search data "
    "deterministic device ema-half-life eta filters flip gamma hidden images init-scale jitter keep lambda-k latent "
    "latents loader log log-every lr lr-fall lr-floor lr-window max-bad max-pixels minutes out passes precision "
    "prefetch preset profile rank-timeout recompute repeats requeue-code resume sample-every scaling seed size skips "
    "steps updates vanishing widths workers"
)
BENCH_OPTIONS = "batch-size compile cudnn-search device filters json modes precision preset rounds size"
EVALUATE_OPTIONS = "against count crop device extractor inception json max-bad max-pixels seed size"
SAMPLE_OPTIONS = "columns count device gif interpolate out seed single"


def _options(capsys: pytest.CaptureFixture[str], *command: str) -> list[str]:
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    names = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", capsys.readouterr().out)) - {"help"}
    return sorted(n for n in names if not (n.startswith("no-") and n.removeprefix("no-") in names))


def test_the_settings_of_a_run_are_a_preset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = "--size 16 --widths 1 2 --filters 2 --hidden 4 --latent 4 --batch-size 4 --device cpu --gamma 0.6".split()
    assert main(["train", *flags, "--steps", "3", "--data", "faces:16", "--out", str(tmp_path / "a")]) == 0
    config = str(tmp_path / "a" / "config.json")
    again = ["train", "--preset", config, "--data", "portraits:16", "--out", str(tmp_path / "b")]
    assert main(again) == 0 and main([*again, "--steps", "5"]) == 0  # the second goes on with the first
    settings = [RunFolder(tmp_path / name).read_config() for name in "ab"]
    changes = {"data": "portraits:16", "steps": 5}
    assert settings[1] == replace(settings[0], train=replace(settings[0].train, **changes))
    capsys.readouterr()
    assert main(["doctor", "--preset", config]) == 0 and "at batch 4" in capsys.readouterr().out
    assert main(["train", "--preset", str(tmp_path / "none.json")]) == 2
    assert "none.json is not a config of this version: " in capsys.readouterr().err


def test_options_are_added_on_purpose(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert _options(capsys, "train") == TRAIN_OPTIONS.split()
    assert _options(capsys, "sample") == SAMPLE_OPTIONS.split()
    assert _options(capsys, "evaluate") == EVALUATE_OPTIONS.split()
    assert _options(capsys, "explore") == "data device out seed".split()
    assert _options(capsys, "export") == "check format net out".split()
    assert _options(capsys, "info") == ["markdown"]
    assert _options(capsys, "doctor") == "batch-size cudnn-search device filters precision preset size tune".split()
    assert _options(capsys, "bench", "step") == BENCH_OPTIONS.split()
    assert _options(capsys, "bench", "report") == ["out", "results", "summary"]  # the last is named as pytest's
    assert _options(capsys, "bench", "record") == "device fd m preset seed".split()
    assert _options(capsys, "bench", "plan") == "batch-size gpu gpus json link network preset results share".split()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["train", "--preset", "big"], "preset is 'big'; accepted: demo, demo-64, paper-32"),
        (["train", "--gamma", "1.5"], "gamma is 1.5; accepted: 0 to 1"),
        (["train", "--size", "48"], "size is 48; accepted: 8 * 2^k"),
        (["train", "--size", "512"], "size 512 has no standard widths"),
        (["train", "--widths", "1", "2"], "accepted: 3 whole numbers"),
        (["train", "--keep", "1"], "keep is 1; accepted: whole numbers from 2"),
        (["train", "--steps", "0"], "steps is 0; accepted: whole numbers from 1"),
        (["train", "--data", "/nowhere/at/all"], "data '/nowhere/at/all' does not exist"),
        (["train", "--data", "faces:4"], "has only 4 images; a batch needs 16"),
        (["train", "--device", "tpu"], "device is 'tpu'; accepted: auto, cpu, cuda"),
        (["train", "--crop", "left"], "crop is 'left'; accepted: center, none"),
        (["train", "--seed", "-1"], "seed is -1; accepted: whole numbers from 0 to 2^63 - 1"),
        (["train", "--seed", str(2**64)], f"seed is {2**64}; accepted: whole numbers from 0 to 2^63 - 1"),
        (["sample", "--seed", str(2**63)], f"seed is {2**63}; accepted: whole numbers from 0 to 2^63 - 1"),
        (["sample", "/nowhere"], "/nowhere is no run folder"),
        (["evaluate", "/nowhere"], "against is missing, and '/nowhere' is no run folder"),
        (["evaluate", "faces", "--against", "faces", "--count", "9"], "count is 9; accepted: whole numbers from 10"),
        (["explore", "/nowhere"], "/nowhere is no run folder"),
        (["explore", "/nowhere", "--seed", "-1"], "seed is -1; accepted: whole numbers from 0"),
        (["export", "/nowhere", "--format", "plain"], "/nowhere is no run folder"),
        (["info", "/nowhere"], "/nowhere is no run folder"),
    ],
)
def test_bad_input_is_one_clear_line(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    if arguments[0] == "train":
        arguments = [*arguments, "--out", str(tmp_path / "run")]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and error.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_a_wrong_tier_in_the_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FASTBEGAN_IMPL", "quick")
    assert main(["info"]) == 2
    assert capsys.readouterr().err.startswith("error: FASTBEGAN_IMPL is 'quick'; accepted: reference, algebraic")


def test_an_unknown_flag_and_a_wrong_type_exit_with_two(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in (["train", "--gama", "0.5"], ["train", "--steps", "many"], ["paint"], []):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
    assert "--gama" in capsys.readouterr().err


def test_an_output_that_cannot_be_written_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_text("mine")
    assert main(["train", "--data", "faces:16", "--out", str(tmp_path / "file" / "run")]) == 2
    assert "cannot be written to" in capsys.readouterr().err
    assert (tmp_path / "file").read_text() == "mine"


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("cli") / "run"
    flags = ["--steps", "4", "--filters", "2", "--data", "faces:32", "--device", "cpu"]
    assert main(["train", *flags, "--out", str(out)]) == 0
    return out


def test_sample_sheet_and_single_images(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = ["--out", str(tmp_path), "--count", "6", "--columns", "3"]
    assert main(["sample", str(run_folder), *where, "--seed", "5", "--single"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == str(tmp_path / "sheet-5.png")
    with Image.open(tmp_path / "sheet-5.png") as sheet:
        assert sheet.size == (3 * 64, 2 * 64)
    singles = sorted((tmp_path / "seed-5").iterdir())  # nothing else in it
    assert [path.name for path in singles] == [f"{number:05d}.png" for number in range(6)]
    with Image.open(singles[0]) as image:
        assert image.size == (32, 32)
    first = singles[0].read_bytes()
    assert main(["sample", str(run_folder), "--out", str(tmp_path), "--seed", "5", "--count", "2", "--single"]) == 0
    assert singles[0].read_bytes() == first  # image 0 of seed 5 whatever the count


def test_sample_interpolation(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", str(run_folder), "--interpolate", "5", "--count", "3", "--gif"]) == 0
    with Image.open(run_folder / "generated" / "interpolation-0.png") as strip:
        assert strip.size == (5 * 64, 3 * 64)
    with Image.open(run_folder / "generated" / "interpolation-0.gif") as animation:
        assert animation.size == (64, 64)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--count", "0"], "count is 0; accepted: whole numbers from 1"),
        (["--interpolate", "1"], "interpolate is 1; accepted: 0 for a sheet"),
        (["--gif"], "gif needs interpolate"),
        (["--count", "10000000000000"], "count is 10000000000000; accepted: whole numbers from 1 to 100000"),
        (["--interpolate", "10000", "--count", "64"], "interpolate is 10000; accepted with count 64: steps up to 1562"),
        (["--interpolate", "5", "--single"], "single is True; accepted with a sheet only, not with interpolate 5"),
        (["--interpolate", "5", "--columns", "4"], "columns is 4; accepted with a sheet only"),
    ],
)
def test_wrong_sample_options(
    run_folder: Path, flags: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["sample", str(run_folder), *flags]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("error", [torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB\nmore"), MemoryError()])
def test_too_little_memory_is_one_clear_line(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise error

    monkeypatch.setattr(TrainStep, "__call__", full)
    flags = ["--steps", "4", "--filters", "2", "--data", "faces:32", "--device", "cpu"]
    assert main(["train", *flags, "--out", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: ") and "out of memory" in said
    for words in ("--recompute", "--accumulate", "--batch-size", "fastbegan doctor --preset demo"):
        assert words in said
    monkeypatch.setattr(TrainStep, "__call__", lambda *_: bool(torch.zeros(2)))
    with pytest.raises(RuntimeError, match="ambiguous"):  # a mistake of the program is not hidden
        main(["train", *flags, "--out", str(tmp_path / "run")])


def test_a_missing_extra_is_named_and_no_other_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "torch_fidelity", None)
    assert main(["evaluate", "faces:20", "--against", "faces:20"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: a package of the extra eval is missing (") and "fastbegan[eval]" in error


def test_info(run_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(run_folder)]) == 0
    printed = capsys.readouterr().out
    assert "step 4, 64 images" in printed and "000000004: whole" in printed and "M 0." in printed


def test_a_foreign_config_is_refused(run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = json.loads((run_folder / "config.json").read_text())
    for change, message in (
        ({"model": 5}, "ModelConfig is 5"),
        ({"model": {**config["model"], "depth": 3}}, "ModelConfig has no field 'depth'"),
        ({"train": {**config["train"], "gamma": "high"}}, "TrainConfig.gamma is 'high'"),
        ({"train": {**config["train"], "gamma": 7}}, "gamma is 7; accepted: 0 to 1"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({**config, **change}))
        assert main(["info", str(tmp_path)]) == 2
        assert message in capsys.readouterr().err


def test_weights_of_another_shape_are_refused(
    run_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((run_folder / "config.json").read_text())
    config["model"]["filters"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "generator.safetensors").write_bytes((run_folder / "generator.safetensors").read_bytes())
    assert main(["sample", str(tmp_path)]) == 2
    assert "does not fit" in capsys.readouterr().err


def test_without_out_every_run_is_a_new_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["train", "--steps", "1", "--filters", "1", "--data", "faces:16", "--device", "cpu"]) == 0
    assert len(list((tmp_path / "runs").iterdir())) == 2


@pytest.mark.parametrize("place", ["~/run", "--out=~/run"])
def test_a_tilde_is_the_home_folder(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], place: str
) -> None:
    monkeypatch.setenv("HOME", str(run_folder.parent))
    monkeypatch.chdir(tmp_path)
    options = [place] if place.startswith("--") else ["--out", place]
    assert main(["train", *options, "--steps", "4", "--device", "cpu"]) == 0  # with the 2 filters of the run
    assert "continued at step 4" in capsys.readouterr().out
    assert main(["info", "~/run"]) == 0
    assert str(run_folder) in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "arguments",
    [
        ["train", "--data", "~/none", "--out", "never"],
        ["train", "--data=~/none", "--out", "never"],
        ["data", "pack", "~/none", "never.pack"],
        ["data", "check", "~/none"],
        ["evaluate", "faces:20", "--against", "~/none"],
        ["evaluate", "~/none", "--against=faces:20"],
        ["data", "info", "~/none"],
    ],
)
def test_a_tilde_is_the_home_folder_in_sources(
    arguments: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert main(arguments) == 2
    assert f"{tmp_path}/none" in capsys.readouterr().err


def test_a_tilde_after_a_kind_is_the_home_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/of/mine")
    for argument, expanded in (
        ("cifar10:~/x", "cifar10:/home/of/mine/x"),
        ("--data=fashion-mnist:~", "--data=fashion-mnist:/home/of/mine"),
        ("./~", "./~"),
        ("a~", "a~"),
        ("--out=./~/run", "--out=./~/run"),
    ):
        assert _expanded(argument) == expanded


def test_a_folder_called_tilde_can_be_named(
    run_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("./~").symlink_to(run_folder)
    assert main(["info", "./~"]) == 0
    assert "step 4" in capsys.readouterr().out


@pytest.mark.parametrize("images", ["faces", "photos of mine", "some.pack", "shard-0.tar"])
def test_images_without_their_option(images: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--steps", "4", images, "--out", str(tmp_path / "run"), "--filters", "2"]) == 2
    error = capsys.readouterr().err
    assert error == f"error: {images!r} stands alone; accepted for images: --data {shlex.quote(images)}\n"
    assert not (tmp_path / "run").exists()
    assert main(["train", "a.jpg", "b.jpg"]) == 2  # *.jpg without quotes
    assert "'a.jpg', 'b.jpg' stands alone; accepted for images: --data FOLDER" in capsys.readouterr().err
    for arguments in (["train", images, "--gama", "1"], ["info", "run", images], ["sample", "--bogus"]):
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert stop.value.code == 2
        assert "Unrecognized" in capsys.readouterr().err  # as before


LEAN = """
import sys, time, torch
started = time.process_time()
import fastbegan, fastbegan_kernels
assert time.process_time() - started < 1.0, time.process_time() - started
assert not torch.cuda.is_initialized()
assert "triton" not in sys.modules and "matplotlib" not in sys.modules and "tyro" not in sys.modules
"""


def test_importing_is_lean() -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAN], env=environment(), capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr


def test_kernels_do_not_need_fastbegan() -> None:
    code = "import sys, fastbegan_kernels; assert 'fastbegan' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], env=environment(), check=True, timeout=300)


def test_python_dash_m(start_fastbegan: Callable[..., subprocess.Popen[str]]) -> None:
    assert "train" in start_fastbegan("--help").communicate(timeout=300)[0]
