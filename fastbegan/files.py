"""Writing files so that a crash leaves the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut, where the platform can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """What the system says against writing (no space, no permission) as a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A binary file that appears at `path`, flushed to disk, when the block ends without an error.

    Raises UserError where the system refuses.
    """
    with writing(path), _atomic(path) as file:
        yield file


@contextlib.contextmanager
def _atomic(path: Path) -> Iterator[IO[bytes]]:
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    temporary = Path(name)
    try:
        with os.fdopen(handle, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would hide results from colleagues
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None]) -> Iterator[int | None]:
    """One process at a time; `waiting` is called where another one is inside. The system frees it when its holder dies.

    Yields the lock's descriptor: a child that inherits it holds the lock too. Where the platform has no such locks,
    nobody waits, and it is None.
    """
    if fcntl is None:
        yield None
        return
    lock = path.with_name(f".{path.name}.lock")
    told = False
    while True:
        with lock.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if not told:
                    waiting()
                told = True
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                same = lock.stat().st_ino == os.fstat(file.fileno()).st_ino
            except FileNotFoundError:
                same = False
            if same:  # else the last holder took the file away while this one waited
                try:
                    yield file.fileno()
                finally:
                    lock.unlink(missing_ok=True)
                return


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write indented JSON atomically."""
    with atomic(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError where there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; expected a JSON file") from None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} holds {type(value).__name__}; expected a JSON object")
    return value


def make_folder(path: Path) -> Path:
    """Create `path` and check that files can be made in it. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written to ({error.strerror}); give a folder that can") from None
    return path


def visible(folder: Path) -> list[Path]:
    """What lies in `folder` and is not hidden; nothing where there is no such folder."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def sha256(path: Path) -> str:
    """Hex digest of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
