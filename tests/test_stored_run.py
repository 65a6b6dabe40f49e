"""A run of an earlier version goes on: tests/stored/run, four steps at commit 28d91aa on tests/stored/images."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from fastbegan.cli import main
from fastbegan.display import Display
from fastbegan.runs.checkpoint import load_latest
from fastbegan.runs.folder import RunFolder
from fastbegan.training.loop import Training

STORED = Path(__file__).parent / "stored"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of the stored run, whose config names the images where they lie here."""
    copy = shutil.copytree(STORED / "run", tmp_path / "run")
    config = json.loads((copy / "config.json").read_text())
    config["train"]["data"] = str(STORED / "images")
    (copy / "config.json").write_text(json.dumps(config))
    return copy


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict | list):
        for key, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(item, f"{name}/{key}")
    else:
        yield name, value


def test_every_tensor_counter_and_setting_is_the_files(run: Path) -> None:
    written = json.loads((run / "config.json").read_text())
    config = RunFolder(run).read_config()
    read = json.loads(json.dumps(config.to_dict()))
    assert written["train"].pop("tensorboard") is False and read["train"].pop("log") == ""
    assert all(read[part].items() >= written[part].items() for part in ("model", "train"))
    assert set(read["train"]) - set(written["train"]) == {
        "cudnn_search",
        "max_pixels",
        "beta1",
        "lr_fall",
    }  # added since
    assert set(read["model"]) - set(written["model"]) == {"init_scale"}
    with Display(quiet=True) as display:
        training = Training(config, run, resume=True, display=display)
    stored = load_latest(STORED / "run" / "checkpoints", torch.device("cpu"))
    assert stored is not None and stored["step"] == 4
    loaded = dict(_leaves(training.state()))
    for name, value in _leaves(stored):
        if isinstance(value, Tensor):
            assert torch.equal(loaded[name], value) and loaded[name].dtype == value.dtype, name
        elif not name.startswith(("/data/files", "/kernels")):  # a digest of paths and times; of this machine
            assert loaded[name] == value, name
    weights = load_file(run / "generator.safetensors")
    average = training.step.average.state_dict()
    assert set(weights) == set(average) and all(torch.equal(average[name], value) for name, value in weights.items())


def test_it_trains_on_and_draws(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--out", str(run), "--steps", "6"]) == 0
    assert "continued at step 4" in capsys.readouterr().out
    steps = [row["step"] for row in RunFolder(run).read_metrics()]
    assert steps == [2, 4, 6] and (run / "samples" / "000000006.png").exists()
    assert main(["sample", str(run), "--count", "2", "--out", str(tmp_path / "drawn")]) == 0
    assert (tmp_path / "drawn" / "sheet-0.png").exists()
    capsys.readouterr()
    assert main(["info", str(run)]) == 0
    told = capsys.readouterr().out
    assert "1,881" in told and "step 6" in told and "000000006: whole" in told


def test_a_run_on_the_faces_of_format_0_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """They are portraits now; the checkpoint's checksum of all pixels says whether they are the same."""
    run = tmp_path / "run"
    flags = "--size 16 --widths 1 1 --filters 2 --repeats 1 --hidden 4 --latent 4 --batch-size 4 --device cpu".split()
    assert main(["train", "--data", "portraits:24", *flags, "--steps", "2", "--out", str(run)]) == 0
    written = json.loads((run / "config.json").read_text())
    assert written.pop("format") == 1
    written["train"] |= {"data": "faces:24", "tensorboard": True}
    del written["train"]["log"]
    (run / "config.json").write_text(json.dumps(written))
    read = RunFolder(run).read_config().train
    assert (read.data, read.log) == ("portraits:24", "tensorboard")
    assert main(["train", "--out", str(run), "--steps", "4"]) == 0
    assert "24 procedural portraits" in capsys.readouterr().out
    continued = json.loads((run / "config.json").read_text())
    assert continued["format"] == 1 and continued["train"]["data"] == "portraits:24"
    assert main(["train", "--out", str(run), "--steps", "6", "--data", "faces:24"]) == 2
    assert "other pixels than 'portraits:24' had" in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps(continued | {"preset": "../../x"}))
    assert main(["info", str(run)]) == 2
    assert "preset is '../../x'; accepted: letters, digits" in capsys.readouterr().err
    (run / "config.json").write_text(json.dumps(continued | {"format": 2}))
    assert main(["info", str(run)]) == 2
    assert "format is 2; accepted: 0 to 1" in capsys.readouterr().err
