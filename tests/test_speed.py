"""What has to be fast, measured in turns or against a bound; by itself on the machine."""

from __future__ import annotations

import copy
import statistics
import subprocess
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastbegan import PRESETS
from fastbegan.convert import accelerate
from fastbegan.display import Display
from fastbegan.runs.checkpoint import list_checkpoints
from fastbegan.runs.folder import RunConfig, RunFolder
from fastbegan.training import checkpoints
from fastbegan.training.loop import Training
from tests.helpers.families import images

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("all cores")]


def test_a_decoder_is_half_again_as_fast() -> None:
    """Four up-blocks of 64 channels to 64 px, forward and backward, in turns, against the faster memory format."""
    blocks = [(nn.Upsample(scale_factor=2), nn.Conv2d(64, 64, 3, padding=1), nn.ELU(inplace=True)) for _ in range(4)]
    plain = nn.Sequential(*(layer for block in blocks for layer in block), nn.Conv2d(64, 3, 3, padding=1), nn.Tanh())
    last: Any = copy.deepcopy(plain)
    last.to(memory_format=torch.channels_last)
    x = images(16, 64, 4, 4).requires_grad_()
    models = {"plain": plain, "channels_last": last, "fast": accelerate(copy.deepcopy(last))}
    seconds: dict[str, list[float]] = {name: [] for name in models}
    for _ in range(9):
        for name, model in models.items():
            begin = time.perf_counter()
            model(x).square().mean().backward()
            seconds[name].append(time.perf_counter() - begin)
    turns = list(zip(*(seconds[name][2:] for name in models), strict=True))
    ratio = statistics.median(min(one, other) / fast for one, other, fast in turns)
    print(f"{ratio:.2f} times as fast")
    assert ratio >= 1.5


def test_a_checkpoint_hardly_holds_up_the_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the size of the demo, on a disk that takes a second: under 50 ms, unless the one before is not done."""
    save = checkpoints.save_checkpoint
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *what: (time.sleep(1), save(*what)))
    preset = PRESETS["demo"]
    config = replace(preset.train, data="faces:64", device="cpu", compile="off")
    with Display(quiet=True) as display:
        training = Training(RunConfig("demo", preset.model, config), tmp_path / "run", resume=True, display=display)
        waited = []
        for _ in range(3):
            training.advance_one()
            training.checkpoints.finish()
            begun = time.monotonic()
            training.checkpoints.save(training.progress.done, training.state)
            waited.append(time.monotonic() - begun)
        training.checkpoints.finish()
    assert len(list_checkpoints(tmp_path / "run" / "checkpoints")) == 2
    print(f"a step waited {[f'{1e3 * one:.1f}' for one in sorted(waited)]} ms")
    assert sorted(waited)[1] < 0.05, waited


def test_a_step_hardly_waits_for_packed_images(
    pictures: Path, tmp_path: Path, fastbegan: Callable[..., subprocess.CompletedProcess[str]]
) -> None:
    flags = ("--data", pictures, "--batch-size", 12, "--loader", "packed", "--device", "cpu", "--compile", "off")
    done = fastbegan("train", *flags, "--steps", 30, "--log-every", 5, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "% waiting for data" in done.stdout
    shares = sorted(row["data_wait"] for row in RunFolder(tmp_path / "run").read_metrics())
    assert 0 < shares[len(shares) // 2] < 0.02, shares
