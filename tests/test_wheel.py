"""What is published: one wheel with both packages, usable away from the repository."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

from tests.helpers.processes import ROOT

USE = """
import fastbegan, fastbegan_kernels, torch
assert "site" in fastbegan.__file__ and "site" in fastbegan_kernels.__file__
from fastbegan import build
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
    data = ("commands/explore.html", "demo/config.json", "demo/generator.safetensors")
    assert {f"fastbegan/{name}" for name in data} <= set(names)
    assert any(name.endswith("licenses/LICENSE") for name in names)
    venv.create(tmp_path / "fresh", symlinks=True)
    python = tmp_path / "fresh" / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", str(wheel)], check=True, timeout=300)
    (site,) = (tmp_path / "fresh").glob("lib/python*/site-packages")
    (site / "torch.pth").write_text(sysconfig.get_path("purelib") + "\n")  # and what else is not ours
    page = (ROOT / "docs" / "drop-in.md").read_text()
    snippets = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    bare["OMP_NUM_THREADS"] = "2"  # with many threads nothing as small as on the page is faster
    for script in ("import fastbegan_kernels", USE, "\n".join(snippets)):
        subprocess.run([str(python), "-W", "error", "-c", script], cwd=tmp_path, env=bare, check=True, timeout=300)
    exe = tmp_path / "fresh" / "bin" / "fastbegan"
    drawn = subprocess.run([str(exe), "sample", "--count", "2"], cwd=tmp_path, env=bare, check=False)
    assert drawn.returncode == 0 and (tmp_path / "generated" / "sheet-0.png").exists()
    done = subprocess.run([str(exe), "info"], cwd=tmp_path, env=bare, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "paper-128" in done.stdout, done.stderr
