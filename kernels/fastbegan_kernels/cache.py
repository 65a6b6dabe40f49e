"""Verdicts and choices about kernels for one kind of machine, in memory and in kernels.json for later processes."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from .dispatch import HAS_TRITON
from .faults import in_short

SECTIONS = ("choices", "passed", "times")
_LOCK_TRIES = 100  # five seconds
_here: dict[str, dict[str, dict[str, Any]]] = {}  # by environment; the disk may be read-only


def cache_file() -> Path:
    """kernels.json in FASTBEGAN_CACHE, else in fastbegan/ of the user's cache folder."""
    if chosen := os.environ.get("FASTBEGAN_CACHE"):
        return Path(chosen) / "kernels.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbegan" / "kernels.json"


@functools.cache
def environment(device: torch.device) -> str:
    """The versions and hardware that a choice depends on, besides the problem and torch's flags."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    facts = [f"torch {torch.__version__}", f"kernels {source.hexdigest()[:16]}"]
    names = ("triton", "pytorch-triton", "triton-windows")
    versions = [distribution.version for name in names for distribution in importlib.metadata.distributions(name=name)]
    facts.append(f"triton {versions[0] if versions else 'unknown'}" if HAS_TRITON else "no triton")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts += [torch.cuda.get_device_name(device), f"sm_{major}{minor}", f"cuda {torch.version.cuda}"]
        facts += [f"driver {_driver()}", f"cudnn {cudnn_version()}"]
    return ", ".join([device.type, *facts])


def cudnn_version() -> int | None:
    """cuDNN's version, or None: torch raises if any card of the machine, used or not, is too old for its cuDNN."""
    try:
        return torch.backends.cudnn.version()
    except RuntimeError:
        return None


def _driver() -> str:
    """The kernel module's version where /proc has it, else the CUDA version that the driver offers."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return str(torch._C._cuda_getDriverVersion())  # pyright: ignore[reportAttributeAccessIssue]


def read(device: torch.device) -> dict[str, dict[str, Any]]:
    """`choices` and `times` by problem and `passed` by variant, from the disk and from this process."""
    name = environment(device)
    sections = _sections(_file().get(name))
    for section, entries in _here.get(name, {}).items():
        sections[section].update(entries)
    return sections


def write(device: torch.device, section: str, entries: dict[str, Any]) -> str | None:
    """Keep entries in memory and on disk. Returns the reason where the disk could not be written, else None."""
    name = environment(device)
    _here.setdefault(name, _sections(None))[section].update(entries)
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        with _locked(path):
            stored = _stored()  # raises for an unreadable file, which must not be overwritten
            sections = _sections(stored.get(name))
            sections[section].update(entries)
            _replace(path, json.dumps({**stored, name: sections}, indent=1))
    except (OSError, RuntimeError) as error:  # RuntimeError: there is no home folder
        return in_short(error)
    return None


def _replace(path: Path, text: str) -> None:
    """Write a file as a whole: readers see the old text or the new one."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".kernels.")
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.umask(mask := os.umask(0))
        Path(temporary).chmod(0o666 & ~mask)  # temporary files are private, but the folder may be shared
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Keep other processes from writing meanwhile, where the system has locks: their entries would be lost."""
    try:
        import fcntl

        lock = path.with_suffix(".lock").open("a")
    except (ImportError, OSError):
        yield
        return
    with lock:
        for _ in range(_LOCK_TRIES):  # then go on without: its holder may be suspended
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
            except OSError:  # some network file systems have none
                break
        yield


def _sections(entries: Any) -> dict[str, dict[str, Any]]:
    """A copy of all sections, empty where the file has something else."""
    entries = entries if isinstance(entries, dict) else {}
    return {name: dict(value) if isinstance(value := entries.get(name), dict) else {} for name in SECTIONS}


def _file() -> dict[str, Any]:
    """The file's content for all environments, empty where it cannot be read."""
    try:
        return _stored()
    except (OSError, RuntimeError):
        return {}


def _stored() -> dict[str, Any]:
    """The file's content, empty where it is missing or damaged. Raises OSError where it cannot be read."""
    try:
        stored = json.loads(cache_file().read_text())
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return stored if isinstance(stored, dict) else {}
