"""The folder for Hugging Face's kernel hub: loaded by their package, offline, by itself and beside the normal one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest

from tests.conftest import ROOT

pytest.importorskip("triton")
try:  # not find_spec("kernels"): from here that is our own folder
    metadata.version("kernels")
except metadata.PackageNotFoundError:
    pytest.skip("Hugging Face's package kernels is not installed", allow_module_level=True)

LOAD = """
import os, subprocess, sys
from pathlib import Path
import torch
import torch.nn.functional as F
from kernels import get_loaded_kernels, get_local_kernel

def names(space):
    found = (name.partition("::") for name in torch._C._dispatch_get_all_op_names())
    return {name for own, _, name in found if own == space}

def check(package, impl):
    torch.manual_seed(0)
    os.environ["FASTBEGAN_IMPL"] = impl
    x, weight, bias = torch.randn(2, 4, 5, 6), torch.randn(3, 4, 3, 3), torch.randn(3)
    expected = F.elu(F.conv2d(F.interpolate(x, scale_factor=2.0), weight, bias, padding=1))
    torch.testing.assert_close(package.upsample_conv2d_elu(x, weight, bias), expected, atol=1e-5, rtol=1e-5)
    layer = package.layers.DownsampleConv2dELU(4, 6)
    leaves = [x.requires_grad_(), layer.weight, layer.bias]
    expected = F.elu(F.conv2d(*leaves, stride=2, padding=1))
    got = layer(x)
    torch.testing.assert_close(got, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(
        torch.autograd.grad(got.square().sum(), leaves), torch.autograd.grad(expected.square().sum(), leaves),
        atol=1e-4, rtol=1e-4,
    )

hub = get_local_kernel(Path(sys.argv[1]), backend="cpu")
(loaded,) = get_loaded_kernels()
space = loaded.metadata.id
"""

ALONE = """
assert hub.__name__ == space and "fastbegan_kernels" not in sys.modules
assert names(space) and not names("fastbegan")
check(hub, "")
check(hub, "fused")
x, weight, bias = torch.randn(1, 4, 5, 6), torch.randn(3, 4, 3, 3), torch.randn(3)
stage = getattr(torch.ops, space).conv_stage
leaves = (x, [weight.requires_grad_()], [bias])
torch.library.opcheck(stage, (*leaves, None, "down", "elu", 1.0, "fused", 1, True, False))
from kernels.python_deps import validate_variant_dependencies
from kernels._rust import Digest, DigestAlgorithm, Metadata
for variant in sorted(Path(sys.argv[1], "build").iterdir()):
    validate_variant_dependencies(variant)
    digest = Metadata.read_from_file(variant / "metadata.json").digest
    digest.validate(Digest.hash_variant(DigestAlgorithm.SHA256, variant))
"""

TRIAL = """
own = hub.fastbegan_kernels
from importlib import import_module
problems, child = (import_module(f"{own.__name__}.{name}") for name in ("problems", "child"))
Popen, places = subprocess.Popen, []
def start(command, **options):
    places.append(options["env"]["PYTHONPATH"].split(os.pathsep)[0])
    return Popen(command, **options)
subprocess.Popen = start
problem = problems.Layer("same", False, "float32", (2, 16, 6, 6), (16, 16, 3, 3))
told = child.tried(problem, torch.device("cpu"), ["plain", "algebraic"])
assert [one.fault for one in told.values()] == [None, None], told
assert Path(places[0]) == Path(hub.__file__).parent == Path(own.__file__).parent.parent
"""

BESIDE = """
import fastbegan_kernels
from fastbegan_kernels import flops as _
if torch.version.cuda:
    other = get_local_kernel(Path(sys.argv[1]), backend="cuda")
    assert other.conv2d_elu is not hub.conv2d_elu
    check(other, "fused")
from importlib import import_module
import_module(f"{hub.fastbegan_kernels.__name__}.flops")
assert names(space) == names("fastbegan")
for package in (hub, fastbegan_kernels, hub):
    check(package, "fused")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "repository"
    subprocess.run([sys.executable, ROOT / "kernels" / "make_hub_folder.py", out], check=True, timeout=60)
    return out


@pytest.mark.parametrize("use", [ALONE, TRIAL, BESIDE], ids=["alone", "trial", "beside"])
def test_the_hubs_loader_takes_it(use: str, folder: Path, tmp_path: Path) -> None:
    ours = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    environment = {**os.environ, **ours, "PYTHONPATH": str(ROOT / "kernels")}
    command = [sys.executable, "-c", LOAD + use, str(folder)]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr


def test_every_name_of_an_op_is_its_own(folder: Path) -> None:
    for path in folder.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "fastbegan::" not in text and "ops.fastbegan" not in text, path


def test_it_is_the_same_each_time_and_nothing_is_overwritten(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "kernels" / "make_hub_folder.py")]
    subprocess.run([*command, str(tmp_path)], check=True, timeout=60)
    # what Python has compiled there meanwhile is not ours
    files = [path.relative_to(folder) for path in sorted(folder.rglob("*.*")) if "__pycache__" not in path.parts]
    assert len(files) > 40
    assert all((folder / name).read_bytes() == (tmp_path / name).read_bytes() for name in files)
    again = subprocess.run([*command, str(tmp_path)], capture_output=True, text=True, timeout=60, check=False)
    assert again.returncode == 1 and "build exists; accepted: a folder without a build" in again.stderr
