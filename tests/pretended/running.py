"""How tests start processes that see pretended devices."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.processes import ROOT, environment

SITE = Path(__file__).parent / "site"


def pretended(cache: Path, gpus: str = "80", tuning: str = "library", **more: object) -> dict[str, str]:
    """The environment of such a process; `more` are other variables by name, without their PRETENDED_."""
    found = {name: value for name, value in environment().items() if not name.startswith("PRETENDED_")}
    found["PYTHONPATH"] = os.pathsep.join((str(SITE), found["PYTHONPATH"]))
    found |= {"TRITON_INTERPRET": "1", "FASTBEGAN_CACHE": str(cache), "PRETENDED_GPUS": gpus}
    found |= {"PRETENDED_TUNING": tuning, "PRETENDED_TRUST": "1"}
    return found | {f"PRETENDED_{name.upper()}": str(value) for name, value in more.items()}


def run(
    arguments: Sequence[object], variables: dict[str, str], seconds: float = 300
) -> subprocess.CompletedProcess[str]:
    """Run Python with these arguments from the project's root, and wait for it."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=variables,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def rows(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    """The JSON rows that a module of this package printed, by their names."""
    assert done.returncode == 0, done.stderr
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    return {row.pop("name"): row for row in found}


def once(paths: pytest.TempPathFactory, name: str, make: Callable[[], Any]) -> Any:
    """What `make` gives, as JSON keeps it: made by the first of pytest's workers that asks, while the others wait."""
    folder = paths.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    with (folder / f"{name}.json").open("a+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.seek(0)
        text = file.read()
        if not text:
            text = json.dumps(make())
            file.write(text)
            file.flush()
        return json.loads(text)


def reports(file: Path) -> list[dict[str, Any]]:
    """What the processes of a command wrote to PRETENDED_REPORT."""
    return [json.loads(line) for line in file.read_text().splitlines()]
