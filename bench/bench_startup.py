"""From the shell to something to read: what a command takes before it works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbegan.bench.results import Row

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("import fastbegan_kernels", "import fastbegan_kernels"),
        ("import fastbegan", "import fastbegan"),
        ("fastbegan info", "from fastbegan.cli import main; main(['info'])"),
    ],
)
def bench_startup(name: str, code: str, race: Callable[..., Row]) -> None:
    if "cli" in code:
        pytest.importorskip("tyro")
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))

    def turn(code: str) -> Callable[[], object]:
        command = [sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": path}
        return lambda: subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

    race(Row("start-up", name), {name: turn(code), "import torch": turn("import torch")})
