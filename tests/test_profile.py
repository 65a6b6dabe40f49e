"""`--profile`: the trace has each named part of a step as often as it has steps."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from fastbegan.cli import main
from tests.test_loggers import FLAGS


def test_each_part_is_in_the_trace_as_often_as_there_are_steps(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FLAGS, "--steps", "14", "--profile", "5", "--out", str(tmp_path)]) == 0
    assert f"profile    {tmp_path / 'profile'}" in capsys.readouterr().out
    trace = json.loads((tmp_path / "profile" / "trace.json").read_text())
    counts = Counter(event["name"] for event in trace["traceEvents"] if event.get("cat") == "user_annotation")
    parts = {name: count for name, count in counts.items() if name in ("images", "gradients", "update", "average")}
    assert parts == {"images": 5, "gradients": 5, "update": 5, "average": 5}
    steps = sorted(name for name in counts if name.startswith("ProfilerStep#"))
    assert steps == ["ProfilerStep#10", "ProfilerStep#6", "ProfilerStep#7", "ProfilerStep#8", "ProfilerStep#9"]


def test_a_run_too_short_for_its_profile_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*FLAGS, "--steps", "9", "--profile", "5", "--out", str(tmp_path)]) == 0
    assert "warning: no profile was written; the run ended 2 steps too early for it" in capsys.readouterr().out
    assert not (tmp_path / "profile").exists()
    assert main([*FLAGS, "--steps", "9", "--profile", "-1", "--out", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: profile is -1; accepted: whole numbers from 0\n"
