"""A child process in which kernels that were never run on this kind of machine are tried: they may kill it.

It writes a line as it goes: "ready" once the device does what it is told, "begin HOW", then "ran HOW", "broken HOW"
where that raised an error, or "starved HOW" where it was for want of memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from .problems import Layer, Pointwise


def trial(task: dict[str, Any], log: Path) -> None:
    """Run each form of a problem on the inputs of a check, and write down before and after that it did."""
    device = torch.device(task["device"])
    kind = {"Layer": Layer, "Pointwise": Pointwise}[task["type"]]
    problem = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in task["problem"].items()})
    if isinstance(problem, Layer):
        torch.backends.cudnn.allow_tf32 = problem.tf32
    torch.ones(8, device=device).sum().item()
    _note(log, "ready")
    for how in task["hows"]:
        _note(log, f"begin {how}")
        try:
            for value in problem.results(how, device):
                value.float().sum().item()  # waits for the device
        except Exception as error:
            starved = isinstance(error, torch.OutOfMemoryError) or "out of memory" in str(error)
            if "CUDA error" in str(error) and not starved:
                raise  # the context is gone: what comes next would fail too
            _note(log, f"{'starved' if starved else 'broken'} {how}")
        else:
            _note(log, f"ran {how}")


def _note(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    trial(json.loads(sys.argv[1]), Path(sys.argv[2]))
