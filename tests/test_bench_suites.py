"""`pytest bench/`: red for what is slower or wrong, a skip for what does not fit, only a report on unknown devices."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.conftest import Suites, _begun
from bench.regression import Accepted
from fastbegan.files import read_json, write_json
from fastbegan.measure.results import Results, Row
from tests.helpers.processes import environment
from tests.pretended.running import pretended, run

ROOT = Path(__file__).resolve().parent.parent
MACHINE = {"device": "CPU Test", "threads": 2}

_TWICE = """
from fastbegan_kernels import library
once = library.forward
def forward(*arguments):
    once(*arguments)
    return once(*arguments)
library.forward = forward
"""
_WRONG = """
from fastbegan_kernels import library
right = library.forward
library.forward = lambda *arguments: 1.1 * right(*arguments)
"""
_FULL = """
from fastbegan import device
device.available_memory = lambda device: 2**20
"""


def test_a_ratio_may_fall_by_the_band(tmp_path: Path) -> None:
    assert not Accepted(tmp_path, MACHINE).known
    first = Accepted(tmp_path, MACHINE)
    first.accept("a b", 2.2, 2.0)
    first.accept("c d", None, None)
    first.save()
    accepted = Accepted(tmp_path, MACHINE)
    assert accepted.known and accepted.ratios == {"a b": 2.0}
    again = Accepted(tmp_path, MACHINE)
    again.accept("a b", 1.9)
    assert again.ratios == {"a b": 1.9}  # of an unknown commit: nothing to put together
    for commit, ratio, kept in (("1", 3.0, 3.0), ("1", 2.5, 2.5), ("1", 2.7, 2.5), ("2", 2.6, 2.6)):
        later = Accepted(tmp_path / "commits", MACHINE | {"commit": commit})
        later.accept("a b", ratio)
        later.save()
        assert later.ratios == {"a b": kept}
    row = Row("a", "b", ratios={"eager": 1.81})
    assert not accepted.fell(row) and row.accepted == 2.0
    assert accepted.fell(Row("a", "b", ratios={"eager": 1.79}))
    assert not accepted.fell(Row("a", "new", ratios={"eager": 0.1}))
    assert not Accepted(tmp_path, MACHINE | {"threads": 4}).known


@pytest.mark.slow
def test_every_suite_can_be_collected_at_once() -> None:
    """As `pytest bench/` does; a suite that cannot be would end the others."""
    command = [sys.executable, "-m", "pytest", "bench/", "--collect-only", "-q"]
    done = subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    for suite in ROOT.glob("bench/bench_*.py"):
        assert f"bench/{suite.name}::" in done.stdout


def test_a_run_that_was_ended_keeps_its_rows_and_another_goes_on(tmp_path: Path) -> None:
    def suites(machine: dict[str, Any]) -> Suites:
        results = _begun(path, machine) or Results(machine, {})
        return Suites(results, path, Accepted(tmp_path, machine), False, (1, 1), 1.0)

    path, today, tomorrow = tmp_path / "rows.json", MACHINE | {"date": "1"}, MACHINE | {"date": "2"}
    first = suites(today)
    for ms in (1.0, 2.0):
        first.keep(Row("step", f"{ms:g}", ms=ms))
        assert Results.load(path).rows == first.measured  # on disk before the next one begins
    second = suites(tomorrow)
    second.keep(Row("step", "1", ms=3.0))
    assert [row.ms for row in Results.load(path).rows] == [2.0, 3.0] and len(second.measured) == 1
    assert suites(MACHINE | {"threads": 4}).results.rows == []  # nothing of another machine


def _bench(tmp_path: Path, *options: str, planted: str = "") -> subprocess.CompletedProcess[str]:
    (tmp_path / "planted.py").write_text(planted)
    path = os.pathsep.join((str(tmp_path), str(ROOT), str(ROOT / "kernels")))
    command = [sys.executable, "-m", "pytest", "-p", "planted", "-q", "-rs", "--quick", "-p", "no:cacheprovider"]
    command += ["--baselines", str(tmp_path / "baselines"), "--results", str(tmp_path / "results.json"), *options]
    command += ["bench/bench_upsample_conv2d_elu.py", "-k", "forward"]
    # inside a worker of pytest-xdist benchmarks would not run
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment = {**inherited, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300, check=False)


@pytest.mark.slow
def test_a_planted_slowdown_is_red(tmp_path: Path) -> None:
    first = _bench(tmp_path)
    assert first.returncode == 0, first.stdout
    assert "no accepted ratios for this device" in first.stdout and "1 passed" in first.stdout
    assert _bench(tmp_path, "--update-baselines").returncode == 0
    (accepted,) = (tmp_path / "baselines").glob("*.json")
    again = _bench(tmp_path)
    assert "accepted" in again.stdout
    found: dict[str, Any] = read_json(accepted)
    (key,) = found["ratios"]
    (row,) = Results.load(tmp_path / "results.json").rows
    assert row.key == key and row.accepted == found["ratios"][key]
    slow = _bench(tmp_path, planted=_TWICE)
    assert slow.returncode == 1 and f"{key}: " in slow.stdout and "was accepted" in slow.stdout, slow.stdout
    write_json(accepted, found | {"ratios": {key: found["ratios"][key] / 3}})
    assert _bench(tmp_path, planted=_TWICE).returncode == 0  # it is the accepted ratio that decides


@pytest.mark.slow
def test_what_is_wrong_is_not_timed(tmp_path: Path) -> None:
    done = _bench(tmp_path, planted=_WRONG)
    assert done.returncode == 1 and "not timed, since it is wrong" in done.stdout, done.stdout
    assert not Results.load(tmp_path / "results.json").rows


@pytest.mark.slow
def test_what_does_not_fit_is_skipped_with_what_it_needs(tmp_path: Path) -> None:
    done = _bench(tmp_path, planted=_FULL)
    assert done.returncode == 0 and "1 skipped" in done.stdout, done.stdout
    assert re.search(r"needs \d\d+ MiB, 1 MiB are free", done.stdout), done.stdout


@pytest.mark.slow
def test_what_is_over_the_budget_is_skipped_with_a_line(tmp_path: Path) -> None:
    done = _bench(tmp_path, "--budget", "0")
    assert done.returncode == 0 and "1 skipped" in done.stdout and "no time left of --budget 0" in done.stdout, done


_ENDED = """
import os
from fastbegan.measure.results import Results
save = Results.save
def saved(self, path):
    save(self, path)
    if self.rows:
        os._exit(9)
Results.save = saved
"""


@pytest.mark.slow
def test_a_benchmark_that_dies_takes_no_row_with_it(tmp_path: Path) -> None:
    done = _bench(tmp_path, planted=_ENDED)
    assert done.returncode == 9 and len(Results.load(tmp_path / "results.json").rows) == 1, done.stdout


_ON_A_GPU = """
from fastbegan import device
from fastbegan.measure import machine
from fastbegan_kernels import problems
from bench import cases
machine.roofline = lambda *_, **__: {"copy_bytes_per_s": 1e12, "flop_per_s": {"bf16": 1e14}}
problems.excess = lambda *_, **__: 0.0  # the interpreter multiplies bf16 wrongly
cases.sets_beyond_cache = lambda size: 2
device.pick_compile = lambda *_: (None, "")
def pytest_collection_modifyitems(items):
    for item in items:
        if "net" in item.fixturenames:
            item.callspec.params["net"] = (32, 4, 2)
"""


def _on_a_gpu(tmp_path: Path, name: str, *options: str, tuning: str = "library") -> Row:
    """The only row of a benchmark file on a pretended GPU."""
    (tmp_path / "planted.py").write_text(_ON_A_GPU)
    variables = pretended(tmp_path / "cache", tuning=tuning)
    variables["PYTHONPATH"] += f"{os.pathsep}{tmp_path}"
    arguments = ["-m", "pytest", "-p", "planted", "-q", "-rs", "-p", "no:cacheprovider", f"bench/bench_{name}.py"]
    arguments += ["--results", tmp_path / "rows.json", *options]
    done = run(arguments, {name: value for name, value in variables.items() if not name.startswith("PYTEST_")})
    assert done.returncode == 0, done.stdout
    results = Results.load(tmp_path / "rows.json")
    assert results.machine["capability"] == "8.0"
    (row,) = results.rows
    assert row.precision == "bf16" and row.ms > 0
    return row


@pytest.mark.slow
def test_forms_are_raced_where_there_is_a_gpu(tmp_path: Path) -> None:
    row = _on_a_gpu(tmp_path, "forms", "--quick", "--sizes", "4", "-k", "same and forward")
    assert list(row.ratios)[:2] == ["plain", "library with epilogue"] and any(
        name.startswith("pointer ") for name in row.ratios
    )


@pytest.mark.slow
def test_ops_and_steps_are_raced_where_there_is_a_gpu(tmp_path: Path) -> None:
    (tmp_path / "step").mkdir()
    row = _on_a_gpu(tmp_path / "step", "step", "-k", "64px-n64-batch16 and joint", tuning="plain")
    assert list(row.ratios) == ["eager"] and "graph breaks" in row.counts
    row = _on_a_gpu(tmp_path, "equilibrium_update", "--quick")
    assert list(row.ratios) == ["eager", "algebraic", "fused"]


_LOSES_ITS_CONTEXT = """
import torch
from tests.kernels.conftest import pytest_runtest_protocol
lost = []
def synchronize():
    if lost:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
torch.cuda.is_available, torch.cuda.synchronize, torch.cuda.lost = lambda: True, synchronize, lost
"""
_THREE = """
import torch
def test_before(): assert not torch.cuda.lost
def test_loses(): torch.cuda.lost.append(True)
def test_after(): assert not torch.cuda.lost
"""


@pytest.mark.slow
def test_a_lost_context_ends_one_worker_and_no_other_test(tmp_path: Path) -> None:
    (tmp_path / "conftest.py").write_text(_LOSES_ITS_CONTEXT)
    (tmp_path / "test_three.py").write_text(_THREE)
    variables = {name: value for name, value in environment().items() if not name.startswith("PYTEST_")}
    done = run(["-m", "pytest", tmp_path, "-n", 1, "-v", "-p", "no:cacheprovider", "--rootdir", tmp_path], variables)
    assert done.returncode == 1 and "crashed while running 'test_three.py::test_loses'" in done.stdout, done.stdout
    assert "1 failed, 3 passed" in done.stdout  # the one that lost it counts twice
