"""python -m tests.ptx CAPABILITY: execute the PTX of the project's kernels on this CPU. README.md here says more.

Prints a line for each configuration, and a summary. Exit code 1: something was wrong.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as the gate

import argparse
import functools
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
    number: int  # of the configuration
    always: bool  # even if it is recorded


def _perform(capability: int, task: _Task) -> Outcome | None:
    """None where the record holds this already."""
    configuration = configurations(capability)[task.number]
    try:
        if not task.always and Record().holds(configuration.name, capability, ptx_hash(configuration, capability)):
            return None
        return run(configuration, capability)
    except Exception as error:  # a stuck or unknown instruction is a fault of this configuration only
        told = traceback.format_exc().splitlines()[-4:]
        return Outcome(configuration.name, "", faults=[f"{type(error).__name__}: {error}", *told])


def _outcomes(capability: int, tasks: Sequence[_Task], jobs: int) -> Iterator[Outcome | None]:
    perform = functools.partial(_perform, capability)
    if jobs == 1:
        yield from map(perform, tasks)
        return
    with multiprocessing.get_context("fork").Pool(jobs) as pool:
        yield from pool.imap_unordered(perform, tasks)


def _in_eighth(name: str, seed: str) -> bool:
    return hashlib.sha256((name + seed).encode()).digest()[0] % 8 == 0


def main(arguments: Sequence[str] | None = None) -> int:
    """See the module's text."""
    parser = argparse.ArgumentParser(prog="python -m tests.ptx", description=__doc__)
    parser.add_argument("capability", type=int, help="80, 90, ...")
    parser.add_argument("--part", action="append", default=[], help="a part of the names to run; may be repeated")
    parser.add_argument("--exact", action="store_true", help="names given by --part are whole")
    parser.add_argument("--record", action="store_true", help="enter results in executed.json as they come")
    parser.add_argument("--changed", action="store_true", help="only what executed.json does not hold")
    parser.add_argument("--eighth", metavar="SEED", help="with --changed: an eighth of the others too, drawn by SEED")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args(arguments)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("TRITON_INTERPRET is set; interpreted code has no PTX")
    torch.set_num_threads(1)
    known = configurations(options.capability)

    def wanted(configuration: Configuration) -> bool:
        name = configuration.name
        return not options.part or any(name == p if options.exact else p in name for p in options.part)

    tasks = [
        _Task(n, not options.changed or (options.eighth is not None and _in_eighth(one.name, options.eighth)))
        for n, one in enumerate(known)
        if wanted(one)
    ]
    tasks.sort(key=lambda task: -known[task.number].work)
    begun, record = time.monotonic(), Record()
    ran = bad = 0
    for outcome in _outcomes(options.capability, tasks, options.jobs):
        if outcome is None:
            continue
        ran, bad = ran + 1, bad + (not outcome.ok)
        print(outcome, flush=True)
        if options.record and outcome.ok:
            record.enter(outcome.name, options.capability, outcome.ptx, outcome.excess)
    if options.record:
        record.keep((one.name for one in known), options.capability)
    held = f", {len(tasks) - ran} recorded before" if options.changed else ""
    print(f"sm_{options.capability}: {ran} executed, {bad} bad{held}, {time.monotonic() - begun:.0f} s")
    return int(bad > 0 or not tasks)


if __name__ == "__main__":
    sys.exit(main())
