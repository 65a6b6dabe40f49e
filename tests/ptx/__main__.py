"""python -m tests.ptx CAPABILITY ...: execute the PTX of the project's kernels on this CPU. README.md here says more.

Prints a line for each configuration, and a summary. Exit code 1: something was wrong.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as the gate

import argparse
import hashlib
import multiprocessing
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .configurations import Configuration, Outcome, configurations, ptx_hash, run
from .record import Record


class _Task(NamedTuple):
    capability: int
    number: int  # of the configuration
    always: bool  # even if it is recorded

    @property
    def configuration(self) -> Configuration:
        return configurations(self.capability)[self.number]

    @property
    def label(self) -> str:
        return f"sm_{self.capability} {self.configuration.name}"


def _perform(task: _Task) -> tuple[_Task, Outcome | None]:
    """None where the record holds this already."""
    configuration, capability = task.configuration, task.capability
    try:
        if not task.always and Record().holds(configuration.name, capability, ptx_hash(configuration, capability)):
            return task, None
        return task, run(configuration, capability)
    except Exception as error:  # a stuck or unknown instruction is a fault of this configuration only
        place = traceback.extract_tb(error.__traceback__)[-1]
        told = f"{type(error).__name__} at {place.filename}:{place.lineno}: {str(error).splitlines()[-1:]}"
        return task, Outcome(configuration.name, "", faults=[told])


def _outcomes(tasks: Sequence[_Task], jobs: int) -> Iterator[tuple[_Task, Outcome | None]]:
    if jobs == 1:
        yield from map(_perform, tasks)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(_perform, tasks)


def _in_eighth(label: str, seed: str) -> bool:
    return hashlib.sha256((label + seed).encode()).digest()[0] % 8 == 0


def _tasks(options: argparse.Namespace) -> list[_Task]:
    """What is to be done, the longest first."""
    found = []
    for capability in options.capability:
        for number in range(len(configurations(capability))):
            task = _Task(capability, number, not options.changed)
            parts = (task.label == part if options.exact else part in task.label for part in options.part)
            if any(parts) or not options.part:
                drawn = options.eighth is not None and _in_eighth(task.label, options.eighth)
                found.append(task._replace(always=task.always or drawn))
    return sorted(found, key=lambda task: -task.configuration.work)


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("capability", type=int, nargs="+", help="80, 90, ...")
    parser.add_argument("--part", action="append", default=[], help="a part of the names to run; may be repeated")
    parser.add_argument("--exact", action="store_true", help="--part gives whole names, as sm_80 fold bf16")
    parser.add_argument("--record", action="store_true", help="enter results in executed.json as they come")
    parser.add_argument("--changed", action="store_true", help="only what executed.json does not hold")
    parser.add_argument("--eighth", metavar="SEED", help="with --changed: an eighth of the others too, drawn by SEED")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set; interpreted code has no PTX")
    torch.set_num_threads(1)
    tasks, record = _tasks(options), Record()
    begun, ran, bad = time.monotonic(), 0, 0
    for task, outcome in _outcomes(tasks, options.jobs):
        if outcome is None:
            continue
        ran, bad = ran + 1, bad + (not outcome.ok)
        print(f"sm_{task.capability} {outcome}", flush=True)
        if options.record and outcome.ok:
            record.enter(outcome.name, task.capability, outcome.ptx, outcome.excess)
    if options.record:
        for capability in options.capability:
            record.keep((one.name for one in configurations(capability)), capability)
    held = f", {len(tasks) - ran} recorded before" if options.changed else ""
    print(f"{ran} executed, {bad} bad{held}, {time.monotonic() - begun:.0f} s")
    return int(bad > 0 or not tasks)


if __name__ == "__main__":
    sys.exit(main())
