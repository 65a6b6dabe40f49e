"""From the shell to something to read: what a command takes before it works."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from fastbegan.measure.results import Row

ROOT = Path(__file__).resolve().parent.parent


_COMMANDS = {
    "import fastbegan_kernels": "import fastbegan_kernels",
    "import fastbegan": "import fastbegan",
    "fastbegan train --help": "from fastbegan.cli import main; main(['train', '--help'])",
}


@pytest.mark.parametrize("name", _COMMANDS)
def bench_startup(name: str, race: Callable[..., Row], quick: bool) -> None:
    if name.startswith("fastbegan"):
        pytest.importorskip("tyro")
    elif quick:
        pytest.skip("not in --quick")
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))

    def turn(code: str) -> Callable[[], object]:
        command = [sys.executable, "-c", code]
        environment = {**os.environ, "PYTHONPATH": path}
        return lambda: subprocess.run(command, env=environment, check=True, stdout=subprocess.DEVNULL)

    race(Row("start-up", name), {name: turn(_COMMANDS[name]), "import torch": turn("import torch")}, least=3)
