"""`python tests/helpers/faulty.py PLACE NUMBER ACTION RANK ...`: `fastbegan ...`, with a fault planted in one rank.

At the NUMBER-th call of PLACE (`name` before it, `name+` after it): kill, hang, raise, lose (contact), full (disk),
nan or drift (of the weights); `hang:FILE` makes FILE, to say so. Ranks but RANK are sound; so is a run that
torchrun started again.
"""

from __future__ import annotations

import errno
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from fastbegan import cli, files
from fastbegan.data.loader import PackedLoader
from fastbegan.distributed.bucket import Bucket
from fastbegan.distributed.ranks import Flight, LostContactError
from fastbegan.runs import checkpoint
from fastbegan.runs.folder import RunFolder
from fastbegan.training import checkpoints, loop, sheets
from fastbegan.training.step import TrainStep

PLACES: dict[str, tuple[Any, str]] = {
    "load": (loop, "open_loader"),
    "config": (RunFolder, "write_config"),
    "prepare": (PackedLoader, "prepare"),
    "step": (TrainStep, "forward"),
    "collect": (Bucket, "collect"),
    "land": (Flight, "land"),
    "metrics": (RunFolder, "append_metrics"),
    "sheet": (sheets, "save_png"),
    "weights": (RunFolder, "write_weights"),
    "copy": (checkpoints, "copied"),
    "save": (torch, "save"),
    "fsync": (os, "fsync"),
    "sum": (checkpoint, "sha256"),
    "manifest": (checkpoint, "write_json"),
    "rename": (Path, "rename"),
    "sync": (checkpoint, "sync_folder"),
    "purge": (shutil, "rmtree"),
    "atomic": (files, "sync_folder"),
}


def _act(action: str, arguments: tuple[Any, ...]) -> None:
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if action.startswith("hang"):
        if path := action.partition(":")[2]:
            Path(path).touch()
        time.sleep(10_000)
    if action == "raise":
        raise ValueError("planted")
    if action == "lose":
        raise LostContactError("no space left in /dev/shm")
    if action == "full":
        raise OSError(errno.ENOSPC, "No space left on device")
    if action in ("nan", "drift"):
        with torch.no_grad():
            next(arguments[0].generator.parameters()).add_(float("nan") if action == "nan" else 1e-3)


def plant(place: str, number: int, action: str) -> None:
    owner, name = PLACES[place.rstrip("+")]
    real: Callable[..., Any] = getattr(owner, name)
    calls = 0

    def faulty(*arguments: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == number and not place.endswith("+"):
            _act(action, arguments)
        found = real(*arguments, **options)
        if calls == number and place.endswith("+"):
            _act(action, arguments)
        return found

    setattr(owner, name, faulty)


if __name__ == "__main__":
    place, number, action, rank, *arguments = sys.argv[1:]
    if os.environ.get("RANK", "0") == rank and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        plant(place, int(number), action)
    sys.exit(cli.main(arguments))
