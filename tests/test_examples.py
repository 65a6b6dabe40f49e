"""Each example trains both of its copies alike, and says what it measured."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest

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
