"""`fastbegan bench record`: a row with the minutes to M and FD."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from fastbegan.cli import main
from fastbegan.commands import bench_record


def _config(folder: Path) -> str:
    """A run of 24 steps, whose settings the record repeats."""
    flags = "--size 16 --widths 1 2 --filters 2 --hidden 4 --latent 4 --batch-size 4 --steps 24 --data faces:40"
    assert main(["train", *flags.split(), "--device", "cpu", "--out", str(folder)]) == 0
    return str(folder / "config.json")


def _rows(printed: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in printed.splitlines() if line.startswith("| ")]


@pytest.mark.slow
def test_the_row_names_what_was_reached(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bench_record, "_IMAGES", 24)
    monkeypatch.setattr(bench_record, "LOG_EVERY", 2)
    config = _config(tmp_path / "run")
    command = ["bench", "record", "--preset", config, "--device", "cpu"]
    assert main([*command, "--m", "10", "--fd", "1e9"]) == 0
    printed = capsys.readouterr().out
    names, _, row = _rows(printed)
    values = dict(zip(names, row, strict=True))
    assert (values["M"], values["FD"]) == ("10", "1e+09") and values["command"].endswith("--fd 1e+09 --seed 0`")
    assert re.fullmatch(r"0\.\d\d", row[names.index("minutes")]) and len(re.findall(r"  FD \d+$", printed, re.M)) == 1
    assert main([*command, "--m", "1e-6", "--fd", "0"]) == 0
    printed = capsys.readouterr().out
    assert _rows(printed)[2].count("not reached") == 2 and len(re.findall(r"  FD \d+$", printed, re.M)) == 12


def test_a_preset_without_levels_needs_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "record", "--preset", "paper-64", "--m", "0.1"]) == 2
    assert capsys.readouterr().err == "error: preset is 'paper-64'; accepted: demo, or another with --m and --fd\n"
