"""Each example trains both of its copies alike, and says what it measured."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fastbegan import cli
from tests.helpers.processes import ROOT, environment

SCRIPTS = {"ebgan": "EBGAN", "began_cs": "BEGAN-CS", "vae": "VAE", "latent_decoder": "latent auto-encoder"}


def test_all_are_here() -> None:
    assert {path.stem for path in (ROOT / "examples").glob("*.py")} == {"race", *SCRIPTS}


@pytest.mark.parametrize(
    "script", [name if name == "ebgan" else pytest.param(name, marks=pytest.mark.slow) for name in SCRIPTS]
)
def test_both_copies_train_alike(script: str) -> None:
    command = [sys.executable, str(ROOT / "examples" / f"{script}.py"), "--steps", "4", "--batch-size", "4"]
    done = subprocess.run(
        [*command, "--device", "cpu"], env=environment(), capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    losses = dict(re.findall(r"^(plain|fast): .* ms a step; (.*)$", done.stdout, re.MULTILINE))
    plain, fast = (list(map(float, re.findall(r" (-?\d+\.\d+)", losses[copy]))) for copy in ("plain", "fast"))
    assert plain and fast == pytest.approx(plain, rel=1e-3, abs=2e-4)
    assert re.search(rf"^{SCRIPTS[script]}: \d+\.\d\dx as fast, 32 px, batch 4, cpu$", done.stdout, re.MULTILINE)
    taken = [
        tuple(map(int, counts)) for counts in re.findall(r": (\d+) of (\d+) nearest x2 to convolution", done.stdout)
    ]
    assert taken and all(0 <= some <= most > 0 for some, most in taken)  # how many depends on the CPU's threads


def _stub(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


@pytest.mark.parametrize(
    ("task", "ends", "code", "requeued"),
    [
        (0, "exit 0", 0, False),
        (5, "exit 3", 3, False),
        (8, "exit 100", 0, True),
        (1, "touch here; sleep 60 & wait $!", 0, True),  # killed by SIGTERM while it starts
        (2, "trap 'exit 100' TERM; touch here; sleep 60 & wait $!", 0, True),
        (2, "trap 'exit 2' TERM; touch here; sleep 60 & wait $!", 2, False),
    ],
)
def test_an_array_of_runs_is_queued_again(tmp_path: Path, task: int, ends: str, code: int, requeued: bool) -> None:
    _stub(tmp_path, "fastbegan", f'printf "%s\\n" "$@" > arguments\n{ends}')
    _stub(tmp_path, "scontrol", 'echo "$@" > requeued')
    variables = {**environment(), "SLURM_ARRAY_TASK_ID": str(task), "SLURM_ARRAY_JOB_ID": "7"}
    variables["PATH"] = f"{tmp_path}:{variables['PATH']}"
    script = [str(ROOT / "examples" / "slurm_array.sh"), "--data", "faces:16"]
    process = subprocess.Popen(script, cwd=tmp_path, env=variables)
    if "here" in ends:
        while not (tmp_path / "here").exists():
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == code
    assert (tmp_path / "requeued").exists() == requeued
    if requeued:
        assert (tmp_path / "requeued").read_text() == f"requeue 7_{task}\n"
    command = cli._parse((tmp_path / "arguments").read_text().splitlines())
    assert (command.train.gamma, command.train.seed) == ((0.3, 0.5, 0.7)[task // 3], task % 3)
    assert command.out == Path(f"runs/gamma-{command.train.gamma}-seed-{command.train.seed}")
