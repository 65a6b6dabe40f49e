"""A first start on a pretended device: one child for all kernels, none the second time; and no batch leaves memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.pretended.running import pretended, rows, run


def _start(cache: Path) -> dict[str, Any]:
    variables = pretended(cache, gpus="90", tuning="child")
    del variables["PRETENDED_TRUST"]
    return rows(run(["-m", "tests.pretended.first_start"], variables))["first start"]


@pytest.mark.slow
def test_one_child_the_first_time_and_none_the_second(tmp_path: Path) -> None:
    first = _start(tmp_path)
    assert first["children"] == 1 and first["problems"] > 20 and not first["warned"] and not first["failed"]
    total = first["told"][-1][1]
    assert total > 50 and [done for done, _ in first["told"]][:total] == list(range(1, total + 1))
    second = _start(tmp_path)
    assert second == {"problems": first["problems"], "failed": 0, "children": 0, "told": [], "warned": []}


def test_a_batch_that_was_tried_leaves_nothing(tmp_path: Path) -> None:
    variables = pretended(tmp_path, tuning="plain", memory=24)
    row = rows(run(["-m", "tests.pretended.memory_of_steps"], variables))["memory"]
    assert row == {"left": 0, "fitted": {"2": True, "512": False}, "chosen": 0}  # no kernel for a batch that is tried
