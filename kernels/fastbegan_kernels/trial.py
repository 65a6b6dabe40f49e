"""A child process in which kernels that were never run on this kind of machine are tried: they may kill it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch

from .problems import Layer, Pointwise


def trial(task: dict[str, Any], log: Path) -> None:
    """Run each form of a problem on the inputs of a check, and write down before and after that it did."""
    kind = {"Layer": Layer, "Pointwise": Pointwise}[task["type"]]
    problem = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in task["problem"].items()})
    if isinstance(problem, Layer):
        torch.backends.cudnn.allow_tf32 = problem.tf32
    for how in task["hows"]:
        _note(log, f"begin {how}")
        try:
            for value in problem.results(how, torch.device(task["device"])):
                value.float().sum().item()  # waits for the device
        except Exception as error:  # what does not compile is found out by the check that follows
            if "CUDA error" in str(error):
                raise  # the context is gone: what comes next would fail too
        _note(log, f"ran {how}")


def _note(log: Path, line: str) -> None:
    with log.open("a") as file:
        file.write(line + "\n")


if __name__ == "__main__":
    trial(json.loads(sys.argv[1]), Path(sys.argv[2]))
