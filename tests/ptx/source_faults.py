"""Faults planted into a kernel's Triton source: python -m tests.ptx.source_faults.

Each line of the output is a kernel without its halo mask, and by what that shows. Exit code 1: one went unnoticed.
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

import torch
from triton.runtime.jit import JITFunction

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


def main() -> int:
    """See the module's text."""
    torch.set_num_threads(1)
    unnoticed = 0
    with tempfile.TemporaryDirectory() as folder:
        for name in _CASES:
            configuration = named(name, 80)
            assert configuration.case is not None
            kernel = configuration.case[1]
            replaced = edited(kernel, r"^( *)inside = .*$", r"\1inside = m >= 0", Path(folder))
            device = Device(80, replaced={kernel.__name__: replaced})
            layers = dataclasses.replace(configuration, case=None, problems=configuration.problems[-1:])
            outcome = run(layers, 80, device)
            signs = [kind for kind in outcome.notes if kind in ERRORS] + ["result"] * (outcome.excess > 1)
            print(f"{kernel.__name__} without its halo mask, {name}: {signs}", flush=True)
            unnoticed += not signs
    return int(unnoticed > 0)


if __name__ == "__main__":
    sys.exit(main())
