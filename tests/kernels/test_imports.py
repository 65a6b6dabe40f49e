"""Each module imports first: no circle of imports stands by the order of lines in the package's __init__."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

import fastbegan_kernels
from fastbegan_kernels.dispatch import HAS_TRITON

FOLDER = Path(fastbegan_kernels.__path__[0])
FILES = [path.relative_to(FOLDER).with_suffix("") for path in sorted(FOLDER.rglob("*.py"))]
MODULES = [".".join(path.parts) for path in FILES if path.name != "__init__"]
# torch is imported once; each fork then has a bare package in sys.modules, so that no other module comes before
SCRIPT = """
import importlib, json, os, sys, traceback, types
import torch

folder, *modules = sys.argv[1:]
for module in modules:
    if not (child := os.fork()):
        package = sys.modules["fastbegan_kernels"] = types.ModuleType("fastbegan_kernels")
        package.__path__ = [folder]
        error = ""
        try:
            importlib.import_module(f"fastbegan_kernels.{module}")
        except BaseException:
            error = traceback.format_exc()
        print(json.dumps({module: error}), flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def errors() -> dict[str, str]:
    command = [sys.executable, "-c", SCRIPT, str(FOLDER), *MODULES]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    return {module: error for line in run.stdout.splitlines() for module, error in json.loads(line).items()}


@pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has imported torch")
@pytest.mark.xdist_group("imports")  # one process for all
@pytest.mark.parametrize("module", MODULES)
def test_each_module_can_be_the_first(module: str, errors: dict[str, str]) -> None:
    if module.startswith("fused") and not HAS_TRITON:
        pytest.skip("needs Triton")
    assert not errors[module], errors[module]
