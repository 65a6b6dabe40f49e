"""Checkpoints that survive crashes: a folder each, complete as soon as it has its name.

`checkpoints/000001000/` holds `state.pt` and `manifest.json` (size and SHA-256 of the state). It is written under a
temporary name, flushed, and renamed. Loading verifies the manifest and skips a damaged checkpoint with a warning.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import warnings
from collections.abc import Callable
from concurrent.futures import Future, wait
from pathlib import Path
from typing import Any

import torch

from ..device import one_core_each
from ..distributed.ranks import Ranks
from ..errors import UserError
from ..files import sha256, sync_folder, write_json

_STATE, _MANIFEST, _TEMPORARY = "state.pt", "manifest.json", ".writing-"


class UnreadableError(UserError):
    """The system cannot read a checkpoint, which may be undamaged."""


def save_checkpoint(folder: Path, step: int, state: dict[str, Any], keep: int = 2) -> Path:
    """Write the checkpoint of one step, and remove surplus ones.

    Checkpoints of later steps are removed too: they were damaged, or the run was continued from an earlier one.

    Args:
        folder: Holds all checkpoints of a run; it is made if it does not exist.
        step: Number of steps done.
        state: Tensors and plain values in dicts and lists.
        keep: Number of checkpoints to keep, this one included.

    Returns:
        The checkpoint's folder.

    Raises:
        UserError: The disk is full or the folder cannot be written. Earlier checkpoints are kept.
    """
    target = folder / f"{step:09d}"
    temporary = folder / f"{_TEMPORARY}{target.name}"
    try:
        if not folder.is_dir():
            folder.mkdir(parents=True)
            sync_folder(folder.parent)
        for stale in folder.glob(f"{_TEMPORARY}*"):  # of a writer that was killed
            shutil.rmtree(stale, ignore_errors=True)
        temporary.mkdir()
        path = temporary / _STATE
        # not into the file directly, where torch.save turns a full disk into a RuntimeError without a cause
        serialised = io.BytesIO()
        torch.save(state, serialised)
        with path.open("wb") as file:
            file.write(serialised.getbuffer())
            file.flush()
            os.fsync(file.fileno())
        manifest = {"step": step, "files": {_STATE: {"bytes": path.stat().st_size, "sha256": sha256(path)}}}
        write_json(temporary / _MANIFEST, manifest)
        if target.exists():  # a damaged checkpoint that was skipped, or the same step once more
            shutil.rmtree(target)
        temporary.rename(target)
        sync_folder(folder)
    except (OSError, UserError) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        reason = error.strerror if isinstance(error, OSError) else error
        raise UserError(f"checkpoint {target} cannot be written ({reason}); earlier ones are kept") from None
    checkpoints = list_checkpoints(folder)
    end = checkpoints.index(target) + 1
    for surplus in (*checkpoints[end:], *checkpoints[: max(0, end - keep)]):
        shutil.rmtree(surplus, ignore_errors=True)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Checkpoint folders, oldest first, damaged ones included."""
    if not folder.is_dir():
        return []
    return sorted(path for path in folder.iterdir() if path.is_dir() and path.name.isdecimal())


def damage(checkpoint: Path) -> str | None:
    """The first fault of a checkpoint, or None if every file is as its manifest says."""
    try:
        return _damage(checkpoint)
    except OSError as error:
        return f"{error.filename or checkpoint} cannot be read: {error.strerror or error}"


def _damage(checkpoint: Path) -> str | None:
    """`damage`, but raises OSError where the system cannot read an existing file."""
    try:
        files = json.loads((checkpoint / _MANIFEST).read_bytes())["files"]
        if _STATE not in files:
            return f"its manifest does not name {_STATE}"
        for name, entry in files.items():
            path = checkpoint / Path(name).name
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes instead of {entry['bytes']}"
            if sha256(path) != entry["sha256"]:
                return f"{name} does not match its checksum"
    except (FileNotFoundError, IsADirectoryError) as error:
        return f"{Path(error.filename).name} is missing"
    except ValueError as error:
        return f"{_MANIFEST} cannot be read as JSON: {error}"
    except (KeyError, TypeError, AttributeError):
        return "its manifest is not one of ours"
    return None


def read_checkpoint(checkpoint: Path, device: torch.device) -> dict[str, Any]:
    """Read the state in a checkpoint's folder, without unpickling any object.

    Args:
        checkpoint: The checkpoint's folder.
        device: Device of all tensors in the result.

    Returns:
        The state that `save_checkpoint` was given.

    Raises:
        UserError: The checkpoint is damaged or holds other types than tensors and plain values.
    """
    try:
        if problem := _damage(checkpoint):
            raise UserError(f"checkpoint {checkpoint} is damaged ({problem})")
        # to the CPU first: an error of the GPU is not damage
        state = torch.load(checkpoint / _STATE, map_location="cpu", weights_only=True)
    except OSError as error:
        name, reason = error.filename or checkpoint / _STATE, error.strerror or error
        raise UnreadableError(f"{name} cannot be read ({reason}); it may be whole, so nothing was changed") from None
    except (pickle.UnpicklingError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        if "allocate memory" in reason:
            raise
        raise UserError(f"checkpoint {checkpoint} cannot be read ({reason})") from None
    return _each(state, lambda tensor: tensor.to(device))


def load_latest(folder: Path, device: torch.device) -> dict[str, Any] | None:
    """Read the newest undamaged checkpoint, without unpickling any object.

    Args:
        folder: Holds all checkpoints of a run.
        device: Device of all tensors in the result.

    Returns:
        The state, or None if there is no checkpoint at all.

    Raises:
        UserError: All checkpoints are damaged; or the system cannot read one, which may be whole and would be removed
            if the run continued from an earlier one.
    """
    checkpoints = list_checkpoints(folder)
    for checkpoint in reversed(checkpoints):
        try:
            return read_checkpoint(checkpoint, device)
        except UnreadableError:  # noqa: PERF203
            raise
        except UserError as error:
            warnings.warn(f"{error}; passed over", stacklevel=2)
    if checkpoints:
        raise UserError(f"every checkpoint in {folder} is damaged; start again with another --out")
    return None


def load_for_all(folder: Path, device: torch.device, ranks: Ranks) -> dict[str, Any] | None:
    """`load_latest` on rank 0, sent to all ranks: the others may not see the folder."""
    if ranks.alone:
        return load_latest(folder, device)
    file = io.BytesIO()
    if ranks.first and (state := load_latest(folder, torch.device("cpu"))) is not None:
        torch.save(state, file)
    data = ranks.bytes_from_first(file.getvalue())
    return torch.load(io.BytesIO(data), map_location=device, weights_only=True) if data else None


def copied(value: Any) -> Any:
    """A copy of tensors, dicts and lists on the CPU, which can be written while training changes the original."""
    return _each(value, lambda tensor: tensor.detach().cpu() if tensor.is_cuda else tensor.detach().clone())


def _each(value: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    if isinstance(value, torch.Tensor):
        return change(value)
    if isinstance(value, dict):
        return {name: _each(item, change) for name, item in value.items()}
    return [_each(item, change) for item in value] if isinstance(value, list) else value


class Writer:
    """Writes in a thread, one job after another. An error in a job is raised by the next call."""

    def __init__(self) -> None:
        self._pool = one_core_each(1)
        self._last: Future[object] | None = None

    def begin(self, write: Callable[[], object]) -> None:
        """Wait for the job before, then call `write` in the thread."""
        self.finish()
        self._last = self._pool.submit(write)

    @property
    def busy(self) -> bool:
        """Whether `begin` would wait."""
        return self._last is not None and not self._last.done()

    def linger(self, seconds: float | None) -> None:
        """Wait for the job, at most `seconds` where it is a number; raise nothing."""
        if self._last is not None:
            wait([self._last], seconds)

    def check(self) -> None:
        """Raise the error of a job that has failed; do not wait."""
        if self._last is not None and self._last.done():
            self.finish()

    def finish(self) -> None:
        """Wait for the job and raise its error."""
        last, self._last = self._last, None
        if last is not None:
            last.result()
