"""Thousands of steps: memory stays where it was, and nothing is compiled again."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT, environment


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_steps(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "soak.py"), str(tmp_path / "run"), "2000"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=1700, check=False)
    assert done.returncode == 0, done.stderr
    quarters = json.loads(done.stdout.splitlines()[-1])
    assert [one["step"] for one in quarters] == [500, 1000, 1500, 2000]
    assert all(one["graphs"] == quarters[0]["graphs"] > 0 and one["breaks"] == 0 for one in quarters), quarters
    grew = quarters[-1]["kib"] - quarters[0]["kib"]
    assert grew < 1.5 * 1024, quarters  # 1 MiB a thousand steps
