"""A run folder has one writer, and every run without --out a folder of its own."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkProcess
from multiprocessing.synchronize import Barrier
from pathlib import Path

import pytest

from fastbegan import UserError
from fastbegan.cli import main
from fastbegan.files import HeldError, locked
from fastbegan.runs import folder as folder_module
from fastbegan.runs.folder import RunFolder, new_run_folder
from fastbegan.training import checkpoints
from fastbegan.training.loop import Training
from tests.helpers.processes import TINY, environment

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Start = Callable[..., "subprocess.Popen[str]"]
ENDLESS = [*TINY, "--device", "cpu", "--compile", "off", "--steps", "1000000", "--checkpoint-every", "20"]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 200
    while not condition():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.02)


def _hold(path: Path, ready: Path) -> None:
    with locked(path):
        ready.touch()
        time.sleep(1000)


def _holder(path: Path, ready: Path) -> ForkProcess:
    holder = multiprocessing.get_context("fork").Process(target=_hold, args=(path, ready), daemon=True)
    holder.start()
    until = time.monotonic() + 60
    while not ready.exists():
        assert time.monotonic() < until
        time.sleep(0.01)
    return holder


def test_a_lock_names_its_holder_and_falls_with_it(tmp_path: Path) -> None:
    holder = _holder(tmp_path / "thing", tmp_path / "ready")
    words = rf"^process {holder.pid} on {socket.gethostname()}, since \d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d$"
    with pytest.raises(HeldError, match=words), locked(tmp_path / "thing", seconds=0.2):
        pytest.fail("held twice")
    holder.kill()
    with locked(tmp_path / "thing", seconds=10):
        pass
    holder.join()
    assert [path.name for path in tmp_path.iterdir()] == ["ready"]


def _falls(lock: Path) -> bool:
    """Whether nobody holds the lock, now or within a second."""
    until = time.monotonic() + 1
    while time.monotonic() < until:
        with lock.open("r+") as file, contextlib.suppress(BlockingIOError):
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        time.sleep(0.01)
    return False


def test_a_forked_child_does_not_hold_the_lock(tmp_path: Path) -> None:
    """It may outlive its parent: the loader processes of a killed run notice it seconds later."""
    with locked(tmp_path / "thing"):
        (tmp_path / "same").hardlink_to(tmp_path / ".thing.lock")  # which is removed with the lock
        child = multiprocessing.get_context("fork").Process(target=time.sleep, args=(1000,), daemon=True)
        child.start()
        assert not _falls(tmp_path / "same")  # this process has it all the same
    assert _falls(tmp_path / "same")
    child.kill()
    child.join()


def test_a_child_that_is_given_the_lock_holds_it(tmp_path: Path) -> None:
    """So that an experiment is not begun again while runs that it left behind still train."""
    with locked(tmp_path / "thing") as lock:
        assert lock is not None
        (tmp_path / "same").hardlink_to(tmp_path / ".thing.lock")
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=[lock])
    assert not _falls(tmp_path / "same")
    child.communicate(b"\n")
    assert _falls(tmp_path / "same")


def test_the_lock_of_a_file_that_is_gone_is_not_enough(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last holder removed the file, and a third process has made it anew."""
    file, sound, calls = tmp_path / ".thing.lock", fcntl.flock, list[int]()

    def flock(descriptor: int, operation: int) -> None:
        if not calls:
            file.unlink()
            file.touch()
        calls.append(descriptor)
        sound(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "thing") as lock:
        assert lock is not None and os.path.samestat(os.fstat(lock), file.stat())


def test_a_lock_file_of_another_holder_stays(tmp_path: Path) -> None:
    """Someone removed the first holder's, and a second one holds its own."""
    with contextlib.ExitStack() as first, contextlib.ExitStack() as second:
        first.enter_context(locked(tmp_path / "run"))
        (tmp_path / ".run.lock").unlink()
        second.enter_context(locked(tmp_path / "run", seconds=0))
        first.close()
        assert (tmp_path / ".run.lock").exists()
        with pytest.raises(HeldError), locked(tmp_path / "run", seconds=0):
            pass


def test_a_stale_file_of_a_network_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [OSError(errno.ESTALE, "Stale file handle"), None]
    real = fcntl.flock

    def flock(descriptor: int, operation: int) -> None:
        if answers and (answer := answers.pop(0)) is not None:
            raise answer
        real(descriptor, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "run", seconds=5) as descriptor:
        assert descriptor is not None and not answers


def test_a_lock_file_that_another_user_left_can_be_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock, real = tmp_path / ".run.lock", os.open
    lock.touch()

    def opened(path: Path, flags: int, *mode: int) -> int:
        if path == lock and flags & os.O_RDWR:
            raise PermissionError(errno.EACCES, "Permission denied")
        return real(path, flags, *mode)

    monkeypatch.setattr(os, "open", opened)
    with locked(tmp_path / "run", seconds=0) as descriptor:
        assert descriptor is not None
        with pytest.raises(HeldError), locked(tmp_path / "run", seconds=0):
            pass


def test_a_link_to_nothing_in_place_of_runs_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fastbegan: Run
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs").symlink_to(tmp_path / "not-mounted")
    done = fastbegan("train", *TINY, "--steps", 1)
    assert done.returncode == 2 and "runs cannot be made (File exists); give --out" in done.stderr


def test_a_refused_start_leaves_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="planted"), RunFolder(tmp_path / "some" / "where" / "run").reserved():
        raise UserError("planted")
    assert not list(tmp_path.iterdir())
    (tmp_path / "mine").mkdir()
    with RunFolder(tmp_path / "mine").reserved():
        pass
    assert (tmp_path / "mine").is_dir()  # it was there before
    with RunFolder(tmp_path / "run").reserved():
        (tmp_path / "run" / "config.json").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.json"]


def test_a_folder_that_goes_while_another_run_waits_for_it(tmp_path: Path) -> None:
    """The first run is refused and removes the folder that it made; the second, which waited, has it."""
    with ThreadPoolExecutor(1) as pool:
        with RunFolder(tmp_path / "run").reserved():
            second = pool.submit(_write_into, tmp_path / "run")
            time.sleep(0.5)
            assert not second.done()
        second.result(timeout=60)
    assert (tmp_path / "run" / "config.json").exists()


def _write_into(path: Path) -> None:
    with RunFolder(path).reserved():
        (path / "config.json").touch()


def test_a_second_run_in_a_folder_touches_nothing(
    tmp_path: Path, fastbegan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folder_module, "_PATIENCE", 0.3)
    holder = _holder(tmp_path / "run" / "run", tmp_path / "ready")
    before = [(path, path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()]
    done = fastbegan("train", *ENDLESS, "--out", tmp_path / "run")
    said = f"error: {tmp_path / 'run'} is in use by process {holder.pid} on {socket.gethostname()}, since "
    assert done.returncode == 2 and done.stderr.startswith(said) and done.stderr.count("\n") == 1
    assert [(path, path.stat().st_mtime_ns) for path in (tmp_path / "run").iterdir()] == before
    holder.kill()
    holder.join()
    assert fastbegan("train", *TINY, "--steps", 2, "--out", tmp_path / "run").returncode == 0


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL])
def test_a_file_system_without_locks_is_named_once(
    tmp_path: Path, fastbegan: Run, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    sound = fcntl.flock

    def flock(file: int, operation: int) -> None:
        if os.path.samestat(os.fstat(file), (tmp_path / "run" / ".run.lock").stat()):
            raise OSError(number, os.strerror(number))
        sound(file, operation)

    monkeypatch.setattr(fcntl, "flock", flock)
    done = fastbegan("train", *TINY, "--steps", 2, "--out", tmp_path / "run")
    why = f"takes no locks ({os.strerror(number)}); start no second process that writes there"
    assert done.returncode == 0 and done.stderr == f"warning: {tmp_path / 'run'} {why}\n"
    assert not (tmp_path / "run" / ".run.lock").exists()


def _make_folder_at(barrier: Barrier, where: Path) -> None:
    os.chdir(where)
    barrier.wait(60)
    with new_run_folder("demo") as path:
        path.joinpath("config.json").touch()


def test_folders_made_at_once_are_different(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    barrier = context.Barrier(20)
    jobs = [context.Process(target=_make_folder_at, args=(barrier, tmp_path), daemon=True) for _ in range(20)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join(60)
        assert job.exitcode == 0
    assert len(list((tmp_path / "runs").glob("*/config.json"))) == len(list((tmp_path / "runs").iterdir())) == 20


def test_a_refused_start_without_out_leaves_nothing(
    tmp_path: Path, fastbegan: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert fastbegan("train", "--data", "faces:4").returncode == 2
    assert not list(tmp_path.iterdir())
    Path("runs").touch()
    done = fastbegan("train", *TINY, "--steps", 2)
    assert done.returncode == 2 and "runs cannot be made (File exists); give --out" in done.stderr


def test_the_lock_outlasts_a_checkpoint_that_is_being_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A second Ctrl-C ends a run while its last checkpoint is written in a thread."""
    locked_at_end, advance = list[bool](), Training.advance_one

    def save_slowly(*_: object) -> None:
        time.sleep(0.5)
        locked_at_end.append((tmp_path / "run" / ".run.lock").exists())

    def advance_or_interrupt(training: Training) -> None:
        if training.checkpoints.saved_step == 1:
            raise KeyboardInterrupt
        advance(training)

    monkeypatch.setattr(checkpoints, "save_checkpoint", save_slowly)
    monkeypatch.setattr(Training, "advance_one", advance_or_interrupt)
    train = ["train", *ENDLESS, "--checkpoint-every", "1", "--out", str(tmp_path / "run")]
    assert main(train) == 130 and locked_at_end == [True]


@pytest.mark.slow
def test_of_two_runs_started_at_once_one_trains(tmp_path: Path, start_fastbegan: Start) -> None:
    out = tmp_path / "run"
    jobs = [start_fastbegan("train", *ENDLESS, "--out", out) for _ in range(2)]
    until = time.monotonic() + 200
    while all(job.poll() is None for job in jobs):
        assert time.monotonic() < until
        time.sleep(0.05)
    refused, first = sorted(jobs, key=lambda job: job.poll() is None)
    said = refused.communicate()[0]
    expected = f"error: {out} is in use by process {first.pid} on {socket.gethostname()}, since "
    assert refused.returncode == 2 and said.startswith(expected) and said.count("\n") == 1
    _wait_for(lambda: len(RunFolder(out).read_metrics()) > 3, first)
    first.send_signal(signal.SIGINT)
    first.communicate(timeout=200)
    assert first.returncode == 130
    steps = [row["step"] for row in RunFolder(out).read_metrics()]
    assert steps[:3] == [10, 20, 30] and steps == sorted(set(steps))


@pytest.mark.core
@pytest.mark.slow
@pytest.mark.parametrize("loader", ["packed", "torch"])
def test_after_a_kill_the_folder_is_free(
    tmp_path: Path, pictures: Path, start_fastbegan: Start, fastbegan: Run, monkeypatch: pytest.MonkeyPatch, loader: str
) -> None:
    """At once, although the forked processes of torch's loader live on for seconds."""
    out = tmp_path / "run"
    first = start_fastbegan("train", *ENDLESS, "--data", pictures, "--loader", loader, "--out", out)
    _wait_for(lambda: len(RunFolder(out).read_metrics()) > 2, first)
    monkeypatch.setattr(folder_module, "_PATIENCE", 0.0)
    assert "is in use by process" in fastbegan("train", "--out", out).stderr
    first.kill()
    first.communicate()
    done = fastbegan("train", "--steps", RunFolder(out).read_metrics()[-1]["step"] + 10, "--out", out)
    assert done.returncode == 0 and "continued at step" in done.stdout, done.stderr
    steps = [row["step"] for row in RunFolder(out).read_metrics()]
    assert steps == sorted(set(steps))


@pytest.mark.slow
def test_twenty_runs_started_at_once_have_twenty_folders(tmp_path: Path) -> None:
    flags = "--steps 1 --filters 4 --data faces:16 --batch-size 4 --size 16 --widths 2 2 --device cpu".split()
    command = [sys.executable, "-m", "fastbegan", "train", *flags]
    jobs = [
        subprocess.Popen(command, cwd=tmp_path, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
        for _ in range(20)
    ]
    for job in jobs:
        errors = job.communicate(timeout=500)[1]
        assert job.returncode == 0, errors
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == 20
    assert all([row["step"] for row in RunFolder(folder).read_metrics()] == [1] for folder in folders)
