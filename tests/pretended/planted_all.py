"""Plants all faults, one after another, and prints a row of JSON for each.

`python -m tests.pretended.planted_all` with PRETENDED_GPUS=80,61 and PRETENDED_MEMORY=64.
"""

from __future__ import annotations

import gc
import json
from typing import Any

import torch

from . import planted_captures, planted_devices, planted_order
from .findings import FINDINGS
from .planted import Case, tried, values

CASES = {case.__name__: case for case in Case.__subclasses__()}
assert {case.__module__ for case in CASES.values()} == {
    module.__name__ for module in (planted_captures, planted_devices, planted_order)
}


def counted() -> dict[str, Any]:
    """Waits and copies, each at its line: the lines of this function, counted from its first."""
    row, pinned = values(), torch.ones(8).pin_memory()
    first = counted.__code__.co_firstlineno
    before = FINDINGS.snapshot()
    row.sum().item()
    torch.ones(8).cuda()
    row.copy_(pinned, non_blocking=True)
    row[0] = 1.0
    row.nonzero()
    found = FINDINGS.snapshot() - before
    return {
        "name": "counted",
        "rows": [[kind, int(where.split(" < ")[0].split(":")[1]) - first] for kind, _, where in found],
    }


if __name__ == "__main__":
    for name, case in CASES.items():
        told = {"name": name, "wrong": tried(case().wrong), "right": tried(case().right)}
        gc.collect()
        print(json.dumps(told), flush=True)
    print(json.dumps(counted()), flush=True)
