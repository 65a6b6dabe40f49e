"""The pretended devices tell planted faults, and raise no alarm at the right way; see `tests/pretended`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pretended import findings
from tests.pretended.planted_all import CASES
from tests.pretended.running import once, pretended, rows, run

Rows = dict[str, dict[str, Any]]
PLANTED = pytest.mark.xdist_group("planted")  # one process for all


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> Rows:
    variables = pretended(tmp_path_factory.mktemp("planted"), "80,61", memory=64)
    command = ["-m", "tests.pretended.planted_all"]
    return once(tmp_path_factory, "planted", lambda: rows(run(command, variables)))


@PLANTED
@pytest.mark.parametrize("name", CASES)
def test_a_planted_fault_is_told_and_the_right_way_is_not(planted: Rows, name: str) -> None:
    assert any(CASES[name].told in line for line in planted[name]["wrong"]), planted[name]
    assert planted[name]["right"] == []


@PLANTED
def test_waits_and_copies_are_counted_by_their_lines(planted: Rows) -> None:
    assert sorted(map(tuple, planted["counted"]["rows"])) == [
        (findings.PAGEABLE, 6),
        (findings.PINNED, 7),
        (findings.WAIT, 5),
        (findings.WAIT, 9),
    ]


_CARDS = """
import threading, torch
print(torch.cuda.device_count(), [torch.cuda.get_device_capability(one) for one in range(torch.cuda.device_count())])
torch.cuda.set_device(1)
seen = [torch.ones(1, device="cuda").device.index, torch.zeros(3, device="cuda").sum().device.index]
thread = threading.Thread(target=lambda: seen.append(torch.ones(1, device="cuda").device.index))
thread.start()
thread.join()
with torch.cuda.device(0):
    seen.append(torch.empty(1, device="cuda").device.index)
with torch.cuda.stream(torch.cuda.Stream(0)):
    seen.append(torch.cuda.current_device())
leaf = torch.ones(2, device="cuda", requires_grad=True)
(leaf.to("cuda:0") * 3).sum().backward()
seen += [leaf.grad.device.index, torch.cuda.current_device()]
print(seen, torch.cuda.get_device_name())
try:
    torch.empty(1, device="cuda:2")
except Exception as error:
    print(error)
"""


def test_cards_are_told_apart_and_each_thread_has_a_current_one(tmp_path: Path) -> None:
    done = run(["-c", _CARDS], pretended(tmp_path, "80,61"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "2 [(8, 0), (6, 1)]",
        "[1, 1, 0, 0, 0, 1, 1] Pretended sm_61",
        "CUDA error: invalid device ordinal",
    ]


_WHEEL = """
import warnings, torch
with warnings.catch_warnings(record=True) as heard:
    warnings.simplefilter("always")
    torch.ones(1, device="cuda:0").add(1)
print(len(heard), "compute capability (CC) 5.0" in str(heard[0].message))
try:
    torch.ones(1, device="cuda:1")
except Exception as error:
    print(error)
"""


def test_cards_that_the_wheel_has_no_code_for(tmp_path: Path) -> None:
    done = run(["-c", _WHEEL], pretended(tmp_path, "80,50", arches="sm_80,sm_90"))
    assert done.stdout.splitlines() == [
        "1 True",
        "CUDA error: no kernel image is available for execution on the device",
    ], done.stderr


def test_nothing_is_pretended_where_nobody_asks(tmp_path: Path) -> None:
    variables = pretended(tmp_path)
    del variables["PRETENDED_GPUS"]
    done = run(["-c", "import torch; print(type(torch.cuda.Stream), torch.Tensor.to)"], variables)
    assert done.returncode == 0 and "tests" not in done.stdout and "method" in done.stdout, done.stderr
