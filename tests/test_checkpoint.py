"""Checkpoints: whole or absent, verified, and never unpickled."""

from __future__ import annotations

import errno
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from fastbegan import UserError
from fastbegan.runs import checkpoint
from fastbegan.runs.checkpoint import damage, list_checkpoints, load_latest, save_checkpoint
from tests.helpers.processes import TINY, environment

Run = Callable[..., "subprocess.CompletedProcess[str]"]
CPU = torch.device("cpu")


def _state(step: int) -> dict[str, object]:
    return {"step": step, "weights": {"a": torch.full((100,), float(step))}, "lr": 0.5}


def _save(folder: Path, *steps: int, keep: int = 2) -> None:
    for step in steps:
        save_checkpoint(folder, step, _state(step), keep)


def test_round_trip_and_how_many_are_kept(tmp_path: Path) -> None:
    assert load_latest(tmp_path / "none", CPU) is None
    _save(tmp_path, 1, 2, 30, 100)
    assert [c.name for c in list_checkpoints(tmp_path)] == ["000000030", "000000100"]
    state = load_latest(tmp_path, CPU)
    assert state is not None and state["step"] == 100 and state["lr"] == 0.5
    assert torch.equal(state["weights"]["a"], torch.full((100,), 100.0))
    _save(tmp_path, 200, keep=3)
    assert len(list_checkpoints(tmp_path)) == 3


def test_the_first_one_makes_its_folder_survive_a_power_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[Path] = []
    monkeypatch.setattr(checkpoint, "sync_folder", synced.append)
    _save(tmp_path / "checkpoints", 1, 2)
    assert synced == [tmp_path, tmp_path / "checkpoints", tmp_path / "checkpoints"]


def _truncate(folder: Path) -> None:
    path = folder / "state.pt"
    path.write_bytes(path.read_bytes()[:-10])


def _flip(folder: Path) -> None:
    path = folder / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "reason"),
    [
        (_truncate, "bytes instead of"),
        (_flip, "does not match its checksum"),
        (lambda f: (f / "state.pt").unlink(), "state.pt is missing"),
        (lambda f: (f / "manifest.json").unlink(), "manifest.json is missing"),
        (lambda f: (f / "manifest.json").write_text("{"), "cannot be read as JSON"),
        (lambda f: (f / "manifest.json").write_text("{}"), "not one of ours"),
    ],
)
def test_a_damaged_newest_one_is_passed_over(tmp_path: Path, harm: Callable[[Path], object], reason: str) -> None:
    _save(tmp_path, 1, 2)
    newest = list_checkpoints(tmp_path)[-1]
    harm(newest)
    assert reason in (damage(newest) or "")
    with pytest.warns(UserWarning, match=reason):
        state = load_latest(tmp_path, CPU)
    assert state is not None and state["step"] == 1
    _save(tmp_path, 2)  # the same step again replaces it
    assert damage(newest) is None


def test_what_the_system_refuses_to_read_is_not_damaged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that went on from the one before would remove it."""

    def stale(path: Path) -> str:
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    _save(tmp_path, 1, 2)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "sha256", stale)
        with pytest.raises(UserError, match=r"000000002/state.pt cannot be read .Stale file handle.; it may be whole"):
            load_latest(tmp_path, CPU)
        assert "Stale file handle" in (damage(list_checkpoints(tmp_path)[-1]) or "")
    state = load_latest(tmp_path, CPU)
    assert state is not None and state["step"] == 2


def test_all_damaged_is_an_error(tmp_path: Path) -> None:
    _save(tmp_path, 1, 2)
    for folder in list_checkpoints(tmp_path):
        _truncate(folder)
    with pytest.warns(UserWarning), pytest.raises(UserError, match=r"every checkpoint in .* is damaged"):
        load_latest(tmp_path, CPU)


def test_checkpoints_of_a_given_up_future_go(tmp_path: Path) -> None:
    _save(tmp_path, 10, 20, 30, 40, keep=4)
    for damaged in list_checkpoints(tmp_path)[1:]:
        _truncate(damaged)
    _save(tmp_path, 15)
    assert [int(c.name) for c in list_checkpoints(tmp_path)] == [10, 15]
    assert not any(damage(c) for c in list_checkpoints(tmp_path))


@pytest.mark.parametrize("name", ["save", "fsync", "write_json", "rename", "purge"])
def test_a_crash_anywhere_in_the_writer_leaves_the_last_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    class PowerCutError(BaseException):
        pass

    def crash(*_: object, **__: object) -> None:
        raise PowerCutError

    _save(tmp_path, 1, 2)
    places = {"save": torch, "fsync": os, "write_json": checkpoint, "rename": Path, "purge": checkpoint.shutil}
    with monkeypatch.context() as patch:
        patch.setattr(places[name], "rmtree" if name == "purge" else name, crash)
        with pytest.raises(PowerCutError):
            _save(tmp_path, 3)
    state = load_latest(tmp_path, CPU)
    assert state is not None and state["step"] == (3 if name == "purge" else 2)
    _save(tmp_path, 4)  # what was left behind is in nobody's way
    state = load_latest(tmp_path, CPU)
    assert state is not None and state["step"] == 4
    assert len(list_checkpoints(tmp_path)) == 2


def test_what_the_system_refuses_to_write_is_one_error(tmp_path: Path, fastbegan: Run) -> None:
    """The system itself ends each write: no file may be larger than the nets' weights, which a checkpoint is."""
    out = tmp_path / "run"
    again = fastbegan("train", *TINY, "--steps", 10, "--out", out)
    assert again.returncode == 0, again.stderr
    sizes = [path.stat().st_size for path in (out / "discriminator.safetensors", out / "progress.gif")]
    limits = {out / "checkpoints" / "000000020": max(sizes) + 1000, out / "samples" / "000000020.png": 10_000}
    for path, limit in limits.items():
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            done = fastbegan("train", *TINY, "--steps", 20, "--out", out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert done.returncode == 2, done.stdout + done.stderr
        assert done.stderr.count("error: ") == 1 and "Traceback" not in done.stderr
        assert f"{path} cannot be written (File too large)" in done.stderr
        assert [found.name for found in (out / "checkpoints").iterdir()] == ["000000010"]
    assert fastbegan("train", "--out", out, "--steps", 20).returncode == 0


def test_a_full_disk_is_an_error_and_keeps_the_last_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    _save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match=r"cannot be written .No space left on device.; earlier ones are kept"):
            _save(tmp_path, 2)
    assert [p.name for p in tmp_path.iterdir()] == ["000000001"]


def test_objects_are_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Callable[..., object], tuple[object, ...]]:
            return (Path.write_text, (tmp_path / "owned", "yes"))

    save_checkpoint(tmp_path, 1, {"step": Evil()})
    assert damage(list_checkpoints(tmp_path)[0]) is None
    with pytest.warns(UserWarning, match="cannot be read"), pytest.raises(UserError, match="every checkpoint"):
        load_latest(tmp_path, CPU)
    assert not (tmp_path / "owned").exists()


_THREADS = """
import os
import torch
from fastbegan.runs.checkpoint import Writer
values = torch.rand(1000, 1000)
count = lambda: len(os.listdir("/proc/self/task"))
values.exp()  # starts the main thread's set
before, writer = count(), Writer()
for _ in range(2):
    writer.begin(lambda: values.t().contiguous().exp())
    writer.finish()
print(count() - before, torch.get_num_threads())
"""


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in Linux's /proc")
def test_writing_starts_no_further_threads_of_torch() -> None:
    """With more OpenMP threads than cores, those of the training thread sleep between its operations."""
    variables = {**environment(), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", _THREADS], env=variables, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["1", "2"]
