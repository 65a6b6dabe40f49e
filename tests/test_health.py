"""Trouble is said once, when it begins."""

from __future__ import annotations

from pathlib import Path

import pytest

from fastbegan.cli import main
from fastbegan.runs import appearance
from fastbegan.training.health import HealthMonitor
from tests.helpers.processes import TINY


def test_stuck_k() -> None:
    monitor = HealthMonitor()
    messages = [monitor.after_log(k) for k in (1.0, 1.0, 0.9, *[1.0] * 8)]
    assert [bool(m) for m in messages] == [False] * 7 + [True] + [False] * 3
    assert "k is stuck at 1" in str(messages[7])


def test_divergence() -> None:
    monitor = HealthMonitor()
    # the fifth row in sequence above twice the lowest; a dip below it starts the count again
    losses = (0.3, 0.1, 0.21, 0.21, 0.21, 0.21, 0.19, 0.4, 0.4, 0.4, 0.4, 0.39, 0.4)
    messages = [monitor.after_loss(loss) for loss in losses]
    assert [number for number, message in enumerate(messages) if message] == [11]
    assert "L(x), which had fallen to 0.1, is 0.39; start again with a lower learning rate (--lr)" in str(messages[11])


def test_a_run_that_diverges_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [*TINY, "--device", "cpu", "--log-every", "1", "--out", str(tmp_path / "run")]
    assert main(["train", *flags, "--steps", "30"]) == 0
    assert "diverged" not in capsys.readouterr().out
    assert main(["train", *flags, "--steps", "60", "--lr", "0.5"]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "diverged" in line]
    assert len(said) == 1 and "warning: step " in said[0]


def test_fallen_variety() -> None:
    monitor = HealthMonitor()
    messages = [monitor.after_sheet(d, 1000, 0.1) for d in (0.01, 0.2, 0.15, 0.05, 0.04, 0.2, 0.01)]
    assert [bool(m) for m in messages] == [False, False, False, True, False, False, True]
    assert "fell from 0.20" in str(messages[3])


def test_variety_that_never_rose() -> None:
    monitor = HealthMonitor()
    assert monitor.after_sheet(0.001, 99_999, 0.01) is None
    assert "never rose in 100,000 images" in str(monitor.after_sheet(0.001, 100_000, 0.01))
    assert monitor.after_sheet(0.001, 200_000, 0.02) is None  # said once


def test_a_short_run_is_told_by_its_middle() -> None:
    monitor = HealthMonitor()
    assert monitor.after_sheet(0.001, 35_200, 0.46) is None
    assert "never rose in 38,400 images); try a longer run" in str(monitor.after_sheet(0.001, 38_400, 0.5))
    assert monitor.after_sheet(0.1, 41_600, 0.54) is None


def test_a_run_whose_samples_stay_alike_is_told_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(appearance, "diversity", lambda images: 1.0 if images.std() > 0.3 else 0.001)
    flags = [*TINY, "--sample-every", "10", "--device", "cpu", "--out", str(tmp_path / "run")]
    for steps in ("40", "50"):  # the continued run was told before
        assert main(["train", *flags, "--steps", steps]) == 0
    said = [line for line in capsys.readouterr().out.splitlines() if "look alike" in line]
    assert len(said) == 1 and "warning: step 20: " in said[0] and "never rose in 160 images" in said[0]
