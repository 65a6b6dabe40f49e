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
