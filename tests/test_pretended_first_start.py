"""A first start on a pretended device: one child for all kernels, none the second time; and no batch leaves memory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.pretended.running import pretended, rows, run


def _start(cache: Path, size: int = 64) -> dict[str, Any]:
    variables = pretended(cache, gpus="90", tuning="child")
    del variables["PRETENDED_TRUST"]
    return rows(run(["-m", "tests.pretended.first_start", str(size)], variables))["first start"]


@pytest.mark.slow
def test_one_child_the_first_time_and_none_the_second(tmp_path: Path) -> None:
    first = _start(tmp_path)
    assert first["children"] == 1 and first["problems"] > 20 and not first["warned"] and not first["failed"]
    total = first["told"][-1][1]
    assert total > 50 and [done for done, _ in first["told"]][:total] == list(range(1, total + 1))
    second = _start(tmp_path)
    quiet: dict[str, Any] = {"failed": 0, "children": 0, "raced": [], "told": [], "warned": []}
    assert second == {"problems": first["problems"]} | quiet


@pytest.mark.slow
def test_every_layer_of_the_paper_is_raced_each_way_once(tmp_path: Path) -> None:
    """Forward, input gradient and weight gradient; a stride of 2 has one weight gradient only, the library's."""
    raced = _start(tmp_path, size=128)["raced"]
    assert len({json.dumps(problem) for problem in raced}) == len(raced)

    def shapes(kind: str, **fields: object) -> set[str]:
        # a sheet has one image here, and no backward
        chosen = [p for p in raced if p["type"] == kind and fields.items() <= p.items() and p["x"][0] > 1]
        return {json.dumps([p["kind"], p["x"], p["weight"]]) for p in chosen}

    forward, back = shapes("Layer", backward=False), shapes("Layer", backward=True)
    weights = shapes("WeightGradient")
    assert len(forward) >= 12 and all(any(word in shape for shape in forward) for word in ("same", "down", "up"))
    assert forward - back <= {shape for shape in forward if '"same"' in shape and ", 3, 128, 128]" in shape}
    assert weights == {shape for shape in forward if '"down"' not in shape}


def test_a_batch_that_was_tried_leaves_nothing(tmp_path: Path) -> None:
    variables = pretended(tmp_path, tuning="plain", memory=24)
    row = rows(run(["-m", "tests.pretended.memory_of_steps"], variables))["memory"]
    assert row == {"left": 0, "fitted": {"2": True, "512": False}, "chosen": 0}  # no kernel for a batch that is tried
