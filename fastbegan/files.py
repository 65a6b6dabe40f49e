"""Files that a crash leaves old or new, never half-written; locks between processes; JSON."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import socket
import tempfile
import time
import unicodedata
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_POLL = 0.1  # seconds between looks at a lock that another process holds


def sync_folder(folder: Path) -> None:
    """Flush renames inside `folder` to disk, where the platform can."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError inside the block (no space, no permission) into a UserError that names `path`."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or error})") from None


@contextlib.contextmanager
def atomic(path: Path) -> Iterator[IO[bytes]]:
    """A new binary file, which replaces `path` when the block ends without an error; then it is on disk.

    Raises UserError where the system refuses to write.
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
        temporary.chmod(0o666 & ~_umask())  # mkstemp's 0600 would hide the file from other users
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


class HeldError(Exception):
    """Another process holds a lock; the message names it."""


@contextlib.contextmanager
def locked(path: Path, waiting: Callable[[], None] | None = None, seconds: float = math.inf) -> Iterator[int | None]:
    """Hold a lock beside `path`; one process at a time. The system frees the lock when its holder dies.

    The folder is made. `waiting` is called once where another process holds it. After `seconds` of waiting, HeldError
    names that process. Yields the lock's descriptor: a child that is given it by `pass_fds` holds the lock too, a
    forked one does not. Where there are no locks, a warning says so, and None is yielded.
    """
    lock = path.with_name(f".{path.name}.lock")
    descriptor = _taken(lock, waiting, seconds)
    try:
        yield descriptor
    finally:
        if descriptor is not None:
            if _is_at(descriptor, lock):  # else it is another holder's by now
                with contextlib.suppress(OSError):  # what stays locks nobody out
                    lock.unlink()
            _held.discard(descriptor)
            os.close(descriptor)


def _taken(lock: Path, waiting: Callable[[], None] | None, seconds: float) -> int | None:
    until = time.monotonic() + seconds
    while True:
        with contextlib.ExitStack() as opened:
            lock.parent.mkdir(parents=True, exist_ok=True)  # a holder that made it may remove it again
            is_new = not lock.exists()
            try:
                descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)  # NFS takes locks of writable files only
            except FileNotFoundError:  # it was removed just now
                continue
            except PermissionError:  # another user's process left it
                descriptor = os.open(lock, os.O_RDONLY)
            opened.callback(os.close, descriptor)
            try:
                if fcntl is None:
                    raise OSError("the platform has none")
                # not lockf: that ends when the process closes the file anywhere
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() >= until:
                    raise HeldError(os.read(descriptor, 1000).decode(errors="replace") or "another process") from None
                if waiting is not None:
                    waiting()
                    waiting = None
                time.sleep(_POLL)
                continue
            except OSError as error:  # its number differs between file systems
                if error.errno == errno.ESTALE and time.monotonic() < until:  # removed by a holder elsewhere, on NFS
                    time.sleep(_POLL)
                    continue
                why = error.strerror or error
                message = f"{lock.parent} takes no locks ({why}); start no second process that writes there"
                warnings.warn(message, stacklevel=4)
                if is_new:
                    lock.unlink(missing_ok=True)
                return None
            if _is_at(descriptor, lock):  # else the last holder removed the file while this process waited
                with contextlib.suppress(OSError):  # a disk may be full, and the lock holds all the same
                    os.ftruncate(descriptor, 0)
                    since = time.strftime("%Y-%m-%d %H:%M:%S")
                    os.write(descriptor, f"process {os.getpid()} on {socket.gethostname()}, since {since}".encode())
                _held.add(descriptor)
                opened.pop_all()
                return descriptor


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(descriptor))
    except OSError:  # it is gone; on NFS, stale
        return False


_held: set[int] = set()  # descriptors of the locks of this process


def _let_go() -> None:
    """Close the locks in a forked child: they would be held until it ends, too, which may be long after its parent."""
    for descriptor in _held:
        os.close(descriptor)
    _held.clear()


if hasattr(os, "register_at_fork"):  # not on Windows
    os.register_at_fork(after_in_child=_let_go)


@contextlib.contextmanager
def removed_if_empty(path: Path) -> Iterator[None]:
    """At the end of the block, remove `path` and the folders above it that were missing and have nothing in them."""
    missing = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # something is in it, or it was never made
            for folder in missing:
                folder.rmdir()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    with atomic(path) as file:
        file.write((json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises UserError for a missing file and for any other content."""
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
    """Create the folder `path` and check that it can be written to; returns it. Raises UserError."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"{path} cannot be written to ({error.strerror}); give a folder that can") from None
    return path


def visible(folder: Path) -> list[Path]:
    """Entries of `folder` that are not hidden; none where the folder does not exist."""
    return [path for path in folder.iterdir() if not path.name.startswith(".")] if folder.is_dir() else []


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal digits."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def printable(text: str) -> str:
    """`text` in one line that a terminal only shows: what it would act on, or could not show, is written in escapes."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or unicodedata.category(c) == "Zs" else _escaped(c) for c in text)


def _escaped(character: str) -> str:
    code = ord(character)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a name that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return {"\n": "\\n", "\r": "\\r", "\t": "\\t"}.get(character, f"\\x{code:02x}" if code < 256 else f"\\u{code:04x}")
