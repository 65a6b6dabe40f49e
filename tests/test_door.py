"""What holds before torch is imported and when a command ends: interrupts, closed pipes, the version."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

import pytest

from fastbegan.version import __version__
from tests.helpers.processes import TINY, environment

# as the script `fastbegan` does it; -X importtime writes a line for each module, when it has been imported
COMMAND = [sys.executable, "-X", "importtime", "-c", "from fastbegan.__main__ import main; raise SystemExit(main())"]
IN_BACKGROUND = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from fastbegan.__main__ import main
signal.raise_signal(signal.SIGINT)
try:
    main()
finally:
    signal.raise_signal(signal.SIGINT)
"""


def _own_lines(errors: str) -> list[str]:
    return [line for line in errors.splitlines() if not line.startswith("import time:")]


def _read_until(module: str, errors: IO[str]) -> None:
    for line in errors:
        if line.split("|")[-1].strip() == module:
            return
    pytest.fail(f"{module} was never imported")


def _interrupted_after(module: str, seconds: float, *arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [*COMMAND, *arguments], env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stderr is not None
    _read_until(module, process.stderr)
    time.sleep(seconds)
    process.send_signal(signal.SIGINT)
    return process


@pytest.mark.core
@pytest.mark.parametrize(
    ("module", "seconds"),
    [
        ("fastbegan.__main__", 0.05),
        ("fastbegan.__main__", 0.3),
        ("numpy", 0),
        ("torch._C", 0),
        ("torch.nn.modules", 0),
        ("torch.optim", 0),
        ("tyro", 0),
    ],
)
def test_an_interrupt_while_torch_is_imported_is_one_line(module: str, seconds: float) -> None:
    process = _interrupted_after(module, seconds, "train", "--steps", "1000000", "--out", os.devnull)
    output, errors = process.communicate(timeout=100)
    assert process.returncode == 130 and _own_lines(errors) == ["interrupted"] and not output


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.02 * number for number in range(1, 150, 7)])
def test_an_interrupt_at_any_moment_is_one_line(seconds: float, tmp_path: Path) -> None:
    process = _interrupted_after(
        "fastbegan.__main__", seconds, "train", *TINY, "--steps", "1000000", "--out", str(tmp_path / "run")
    )
    output, errors = process.communicate(timeout=100)
    lines = [] if "stopped after" in output else ["interrupted"]  # else it was not training yet
    assert process.returncode == 130 and _own_lines(errors) == lines, output + errors


@pytest.mark.slow
def test_an_ignored_interrupt_stays_ignored() -> None:
    """A shell starts a job in the background so."""
    command = [sys.executable, "-c", IN_BACKGROUND, "info", "--help"]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "--markdown" in done.stdout and not done.stderr


def _unread(*arguments: object, output: int | None = None) -> tuple[int, str]:
    """Exit code and errors of a command whose output nobody reads."""
    variables = environment()
    variables.pop("PYTHONUNBUFFERED", None)  # a buffer is written when Python ends, too late for a word
    reader, writer = os.pipe()
    os.close(reader)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "fastbegan", *map(str, arguments)],
            env=variables,
            stdout=writer if output is None else output,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            timeout=300,
        )
    finally:
        os.close(writer)
    return done.returncode, done.stderr


@pytest.mark.parametrize(
    "arguments", [["--version"], *(pytest.param([word], marks=pytest.mark.slow) for word in ("--help", "info"))]
)
def test_a_reader_that_has_left_ends_a_command_quietly(arguments: list[str]) -> None:
    assert _unread(*arguments) == (141, "")


@pytest.mark.slow
def test_training_goes_on_without_a_reader(tmp_path: Path) -> None:
    flags = [*TINY, "--steps", "20", "--out", tmp_path / "run"]
    code, errors = _unread("train", *flags)
    assert code == 0 and (tmp_path / "run" / "progress.gif").exists()
    assert errors == "warning: the output cannot be written (Broken pipe); the work goes on; Ctrl-C ends it\n"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full here")
def test_a_full_disk_under_the_output_is_one_line() -> None:
    with Path("/dev/full").open("w") as full:
        code, errors = _unread("--version", output=full.fileno())
    assert code == 2 and errors == "error: the output cannot be written (No space left on device)\n"


def test_the_version_needs_no_torch() -> None:
    done = subprocess.run([*COMMAND, "--version"], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == f"fastbegan {__version__}\n"
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert "fastbegan.version" in modules and modules.isdisjoint({"torch", "numpy", "tyro"})


def test_what_breaks_the_import_of_torch_is_named(tmp_path: Path) -> None:
    """A missing library of CUDA, say; the output has nothing to do with it."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text("raise OSError('libcudart.so.12: cannot open shared object file')")
    variables = environment()
    variables["PYTHONPATH"] = os.pathsep.join((str(tmp_path), variables["PYTHONPATH"]))
    command = [sys.executable, "-m", "fastbegan", "info"]
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "libcudart.so.12" in done.stderr and "output cannot" not in done.stderr
