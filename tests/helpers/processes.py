"""What processes that tests start are given."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).parents[2]
TINY = ["--filters", "4", "--data", "faces:64", "--batch-size", "8", "--log-every", "10"]


def environment() -> dict[str, str]:
    """One thread each; a crash in native code prints the Python stack."""
    variables = {"PYTHONFAULTHANDLER": "1", "OMP_NUM_THREADS": "1"}
    return {**os.environ, **variables, "PYTHONPATH": os.pathsep.join((str(ROOT), str(ROOT / "kernels")))}


def peak_memory() -> int:
    """Bytes that this process has had at most; `ru_maxrss` would begin with those of the process that started it."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM:"))
