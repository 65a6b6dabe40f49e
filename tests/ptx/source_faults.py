"""Faults planted into kernels' Triton source and into launches: python -m tests.ptx.source_faults.

Each line of the output is a fault, and by what it shows. Exit code 1: one went unnoticed.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as the gate

import dataclasses
import importlib.util
import inspect
import re
import sys
import tempfile
from pathlib import Path
from unittest.mock import patch

import torch
from triton.runtime.jit import JITFunction

from fastbegan_kernels.activation import activation_backward

from . import project
from .configurations import run
from .faults import named
from .launch import Device
from .report import ERRORS

_CASES = (
    "conv forward bf16 pointer 64x16x16 w4 s3",
    "upconv forward bf16 pointer 64x16x16 w4 s3",
    "conv forward tf32 pointer 64x32x32 w4 s3",
)


def edited(kernel: JITFunction, pattern: str, replacement: str, folder: Path) -> JITFunction:
    """The kernel of a copy of its module, in which the lines of its code that match are replaced."""
    module = sys.modules[kernel.fn.__module__]
    source = inspect.getsource(kernel.fn)
    new, count = re.subn(pattern, replacement, source, flags=re.MULTILINE)
    assert count, f"{kernel.__name__} has no {pattern}"
    path = folder / f"{kernel.__name__}.py"
    path.write_text(inspect.getsource(module).replace(source, new))
    spec = importlib.util.spec_from_file_location(f"{module.__package__}.{kernel.__name__}_edited", path)
    assert spec is not None and spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(copy)
    return getattr(copy, kernel.__name__)


def without_halo_mask(name: str) -> list[str]:
    """A configuration whose kernel takes every pixel for one inside of the image."""
    configuration = named(name, 80)
    assert configuration.case is not None
    kernel = configuration.case[1]
    with tempfile.TemporaryDirectory() as folder:
        replaced = edited(kernel, r"^( *)inside = .*$", r"\1inside = m >= 0", Path(folder))
        device = Device(80, replaced={kernel.__name__: replaced})
        layers = dataclasses.replace(configuration, case=None, problems=configuration.problems[-1:])
        outcome = run(layers, 80, device)
    return [kind for kind in outcome.notes if kind in ERRORS] + ["result"] * (outcome.excess > 1)


def stored_input() -> list[str]:
    """A kernel that works in place, which nobody has said of it."""
    with patch.object(project, "IN_PLACE", {}):
        return list(run(named("activation fp32", 80), 80).notes)


def read_too_soon() -> list[str]:
    """A gradient in memory that a launcher has allocated and no kernel has written."""
    device = Device(80)
    with device.installed():
        grad = device.allocations.add(torch.empty(1, 16, 2, 2).to(memory_format=torch.channels_last))
        activation_backward(grad, torch.ones_like(grad), "relu", 1.0, "fused")
    return list(device.launches[0].report.kinds())


def main() -> int:
    """See the module's text."""
    torch.set_num_threads(1)
    found = {f"no halo mask, {name}": without_halo_mask(name) for name in _CASES}
    found |= {"stored input": stored_input(), "read too soon": read_too_soon()}
    for name, signs in found.items():
        print(f"{name}: {signs}")
    return int(not all(found.values()))


if __name__ == "__main__":
    sys.exit(main())
