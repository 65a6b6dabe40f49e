"""Child processes that do cases and may die of an illegal access or hang without taking the run with them.

A child appends an outcome per case to a file; where it ends early its case is recorded, and another child goes on
behind it. `python -m bench.gpu_children FOLDER DEADLINE` is such a child.
"""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch

from bench.gpu_cases import DRY, Case, Outcome, case_of, named

ROOT = Path(__file__).resolve().parent.parent


def _environment() -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    chosen = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if DRY else {})
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTBEGAN_IMPL")} | chosen


def _spawn(cases: list[Case], deadline: float, grace: float = 25) -> tuple[list[Outcome], str, str]:
    """Outcomes of the cases that one child came to, how it ended (done, crashed, timed out), and its last words."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases").write_text(json.dumps([asdict(case) for case in cases]))
        (folder / "results").touch()
        command = [sys.executable, "-m", "bench.gpu_children", name, str(deadline), *(["--dry"] if DRY else [])]
        with (folder / "errors").open("wb") as errors:
            process = subprocess.Popen(
                command, env=_environment(), stdout=errors, stderr=errors, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            try:
                end = "done" if process.wait(max(5.0, deadline - time.time()) + grace) == 0 else "crashed"
            except subprocess.TimeoutExpired:
                end = "timed out"
                os.killpg(process.pid, signal.SIGKILL)  # compiler workers of the child go with it
                process.wait()
        words = (folder / "errors").read_text(errors="replace").strip()[-400:] or f"exit status {process.returncode}"
        return [json.loads(line) for line in (folder / "results").read_text().splitlines()], end, words


def work(cases: list[Case], deadline: float) -> list[Outcome]:
    """An outcome per case, in order, whatever becomes of the children."""
    outcomes: list[Outcome] = []
    crashes = 0
    while len(outcomes) < len(cases) and crashes < 3 and time.time() < deadline:
        found, end, words = _spawn(cases[len(outcomes) :], deadline)
        outcomes += found
        if end != "done" and len(outcomes) < len(cases):
            crashes += 1
            outcomes.append({"status": end, "note": words})
    why = "three children died" if crashes == 3 else "no time left"
    outcomes += [{"status": "skipped", "note": why}] * (len(cases) - len(outcomes))
    return [{"case": asdict(case), **outcome} for case, outcome in zip(cases, outcomes, strict=True)]


def work_together(groups: Iterable[list[Case]], deadline: float) -> list[Outcome]:
    """Groups of cases side by side, a child each: most of their time goes to compiling."""
    groups = list(groups)
    if DRY:  # starting a child takes longer than its cases
        groups = [list(itertools.chain.from_iterable(groups))]
    with ThreadPoolExecutor(max(2, min(14, os.cpu_count() or 2))) as pool:
        return [outcome for group in pool.map(partial(work, deadline=deadline), groups) for outcome in group]


def child(folder: Path, deadline: float) -> None:
    """Do what cases say, an outcome a line. Ends with an error where the GPU's context is lost."""
    from bench.gpu_numerics import check, pointwise, tuned
    from bench.gpu_timing import facts, timing, wait

    torch.set_num_threads(1)
    parts: dict[str, Callable[[Case], Outcome]] = {"facts": facts, "check": check, "time": timing}
    parts |= {"pointwise": pointwise, "tuning": tuned}
    with (folder / "results").open("a") as log:
        for fields in json.loads((folder / "cases").read_text()):
            case, start = case_of(fields), time.perf_counter()
            try:
                late = time.time() + case.needs > deadline
                outcome = {"status": "skipped", "note": "no time left"} if late else parts[case.part](case)
                wait()
            except Exception as error:
                wait()
                outcome = {"status": "failed", "note": named(error)}
            took = {"took_s": round(time.perf_counter() - start, 3)}
            print(json.dumps(outcome | took), file=log, flush=True)


if __name__ == "__main__":
    child(Path(sys.argv[1]), float(sys.argv[2]))
