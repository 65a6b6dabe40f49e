"""What is published: one wheel with both packages, usable away from the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .conftest import ROOT

USE = """
import fastbegan, fastbegan_kernels, torch
assert "site" in fastbegan.__file__ and "site" in fastbegan_kernels.__file__
from fastbegan.models import build
generator, _ = build(fastbegan.ModelConfig(size=32, filters=2), seed=0)
assert generator(torch.zeros(1, 64)).shape == (1, 3, 32, 32)
"""


@pytest.mark.slow
def test_wheel_holds_both_packages_and_works(tmp_path: Path) -> None:
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "-q"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", str(tmp_path), str(ROOT)], check=True, timeout=300)
    (wheel,) = tmp_path.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {"fastbegan", "fastbegan_kernels", "fastbegan-0.1.0.dist-info"}
    assert {"fastbegan/py.typed", "fastbegan_kernels/py.typed"} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    site = tmp_path / "site"
    subprocess.run([*pip, "install", "--no-deps", "--target", str(site), str(wheel)], check=True, timeout=300)
    environment = {**os.environ, "PYTHONPATH": str(site)}
    subprocess.run([sys.executable, "-c", USE], cwd=tmp_path, env=environment, check=True, timeout=120)
