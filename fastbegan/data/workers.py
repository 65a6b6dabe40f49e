"""Decoding in worker processes, bounded in memory and time; results in order; a crash costs one file."""

from __future__ import annotations

import contextlib
import json
import math
import os
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from ..device import core_count, one_core_each
from ..errors import UserError
from .decode import Decoding, Note, Picture, RejectedImageError
from .scale import scale
from .worker import HEAD, READY, SLOT, SLOTS, shared

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_CHUNK = 32  # files that a worker gets at once
_HELD = 8 << 20  # bytes of content in memory that a worker gets at once, and one picture more
_START = 60.0  # seconds until a process answers
_SECONDS = 60.0  # after which a file counts as hung
_LOOK = 0.5  # seconds between two looks at the clock
_UNSCALED = 8 << 20  # bytes of whole pictures that wait to be scaled together
_PIPE = 1 << 20  # bytes of a pipe: the most that Linux allows without privileges


class Entry(NamedTuple):
    """A picture of a source: a file, `length` bytes of it from `offset`, or its content itself."""

    name: str
    """For people: a path, or an archive's path and the name inside, with a colon between."""
    path: str = ""
    offset: int = 0
    length: int | None = None
    data: bytes | None = None
    """The content, of archives that are read from front to back."""
    reason: str = ""
    """The reason why there is nothing to decode, where one is known."""


Answer = Picture | RejectedImageError


def _exactly(pipe: IO[bytes], length: int) -> np.ndarray:
    """Read exactly `length` bytes: uint8 [length]. Raises EOFError where the process ends before."""
    data = np.empty(length, np.uint8)
    view = memoryview(data.data)
    while view and (read := pipe.readinto(view)):  # pyright: ignore[reportAttributeAccessIssue]  # it is unbuffered
        view = view[read:]
    if view:
        raise EOFError
    return data


def _write(pipe: IO[bytes], data: bytes) -> None:
    view = memoryview(data)
    while view:  # it is unbuffered
        view = view[pipe.write(view) :]


def _request(entry: Entry) -> bytes:
    """An entry as `worker.main` reads it."""
    if entry.data is None:
        return (json.dumps((entry.path, entry.offset, entry.length)) + "\n").encode()
    return (json.dumps(("", 0, len(entry.data))) + "\n").encode() + entry.data


class _Worker:
    """One process of `worker.main`, started again after a crash."""

    def __init__(self, decoding: Decoding) -> None:
        start = f"import sys; sys.path[:1] = []; from {__package__} import worker; worker.main(*sys.argv[1:])"
        self._memory = os.memfd_create("pictures") if hasattr(os, "memfd_create") else -1  # Linux only
        if self._memory >= 0:
            os.truncate(self._memory, SLOTS * SLOT)  # sparse: a page takes memory when it is written to
        self._slots = shared(self._memory)
        self._command = [sys.executable, "-c", start, decoding.crop, str(decoding.max_pixels), str(self._memory)]
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False
        self._deadline, self._late = math.inf, False
        self._answered = 0  # by this process; gives the slot of the next answer

    def close(self) -> None:
        """End the process for good, even in the middle of an answer."""
        self._closed = True
        self._end()
        if self._memory >= 0:
            os.close(self._memory)
            self._memory = -1

    def _end(self) -> int | None:
        """End the process; returns its exit code."""
        process, self._process = self._process, None
        if process is None:
            return None
        process.kill()
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):  # unsent requests raise BrokenPipeError
                pipe.close()  # pyright: ignore[reportOptionalMemberAccess]
        return process.returncode

    def answers(self, entries: Sequence[Entry]) -> Iterator[Answer]:
        """Yield one answer per entry; a file whose process died is tried once more, then refused."""
        done, tried = 0, -1  # `tried`: the file at which a process died, perhaps killed from outside
        while done < len(entries):
            try:
                for answer in self._ask(self._started(), entries[done:]):
                    done += 1
                    yield answer
            except (OSError, EOFError, ValueError):  # noqa: PERF203  # the first file without an answer killed it
                late, code = self._late, self._end()
                if tried == done:
                    reason = f"took more than {_SECONDS:g} seconds" if late else f"its decoder crashed ({code})"
                    yield RejectedImageError(reason)
                    done += 1
                else:
                    tried = done

    def _ask(self, process: subprocess.Popen[bytes], entries: Sequence[Entry]) -> Iterator[Answer]:
        assert process.stdin is not None and process.stdout is not None
        requests = [_request(entry) for entry in entries]
        # contents may fill the pipe, and a process that waits to be read from would read no further
        ahead = SLOTS if all(entry.data is None for entry in entries) else 1
        _write(process.stdin, b"".join(requests[:ahead]))
        for number in range(len(requests)):
            self._deadline = time.monotonic() + _SECONDS
            answer = self._read(process.stdout)
            self._deadline = math.inf  # the caller may take any time before it wants the next answer
            if later := requests[number + ahead : number + ahead + 1]:
                _write(process.stdin, later[0])
            yield answer

    def _read(self, pipe: IO[bytes]) -> Answer:
        rows, columns, height, width, notes = HEAD.unpack(_exactly(pipe, HEAD.size).data)
        slot, self._answered = self._answered % SLOTS, self._answered + 1
        if not rows:
            return RejectedImageError(_exactly(pipe, columns).tobytes().decode())
        length = rows * columns * 3
        in_slot = len(self._slots) and length <= SLOT
        # copied before the next request is sent, whose answer may overwrite the slot
        pixels = self._slots[slot, :length].copy() if in_slot else _exactly(pipe, length)
        return Picture(height, width, Note(notes), pixels.reshape(rows, columns, 3))

    def _watch(self, process: subprocess.Popen[bytes]) -> None:
        """Kill `process` when an answer is late; runs in a thread."""
        while process.returncode is None and process is self._process:
            if time.monotonic() > self._deadline:
                self._late = True
                process.kill()
                return
            time.sleep(_LOOK)

    def _started(self) -> subprocess.Popen[bytes]:
        """The process, started now where there is none. Raises UserError where none starts on this machine."""
        if self._closed:
            raise RuntimeError("closed")
        if self._process is None:
            paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)  # the same imports as here
            single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # threads' stacks count as address space
            environment = {**os.environ, **single, "PYTHONPATH": paths}
            handles = () if self._memory < 0 else (self._memory,)
            self._answered = 0
            self._process = process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                bufsize=0,
                env=environment,
                pass_fds=handles,
                start_new_session=True,  # a worker that Ctrl-C ended would look like a crash
            )
            assert process.stdout is not None
            with contextlib.suppress(AttributeError, OSError):  # room for the next picture while one is scaled
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)  # pyright: ignore
            self._late, self._deadline = False, time.monotonic() + _START
            threading.Thread(target=self._watch, args=(process,), daemon=True).start()
            try:
                ready = _exactly(process.stdout, len(READY)).tobytes() == READY
            except EOFError:
                ready = False
            if not ready and not self._closed:
                self._end()
                errors = subprocess.run(
                    self._command, input=b"", capture_output=True, env=environment, check=False, pass_fds=handles
                ).stderr.decode(errors="replace")
                reason = errors.strip().rpartition("\n")[2] or "they end at once"
                raise UserError(f"decoder processes do not start here: {reason}")
        return self._process


@dataclass(frozen=True)
class Scaled:
    """A decoded and scaled file: `decode.Picture` with `pixels` uint8 [size, size, 3]."""

    height: int
    width: int
    notes: Note
    pixels: np.ndarray


def decode_all(
    entries: Iterable[Entry], size: int, decoding: Decoding, *, workers: int | None = None
) -> Generator[tuple[Entry, Scaled | RejectedImageError]]:
    """Decode all entries in worker processes; yields each with its answer, in order.

    Args:
        entries: What to decode.
        size: Height and width of the answers' pixels.
        decoding: The part that is kept, and the largest that is decoded.
        workers: Number of processes; None means one per core.

    Raises:
        UserError: Processes do not start on this machine.
    """
    count = workers or core_count()
    waiting, iterator = deque[tuple[list[Entry], Future[list[Scaled | RejectedImageError]]]](), iter(entries)
    free: deque[_Worker] = deque(_Worker(decoding) for _ in range(count))

    def work(chunk: list[Entry]) -> list[Scaled | RejectedImageError]:
        worker = free.pop()  # never empty: there are as many threads as workers
        try:
            answers = iter(_scaled(worker.answers([entry for entry in chunk if not entry.reason]), size))
        finally:
            free.append(worker)
        return [RejectedImageError(entry.reason) if entry.reason else next(answers) for entry in chunk]

    with contextlib.ExitStack() as stack:
        pool = stack.enter_context(one_core_each(count))
        for worker in list(free):  # on exit workers close first, which ends the pool's threads
            stack.callback(worker.close)
        try:
            while True:
                while len(waiting) < 4 * count and (chunk := _chunk(iterator)):
                    waiting.append((chunk, pool.submit(work, chunk)))
                if not waiting:
                    return
                chunk, future = waiting.popleft()
                yield from zip(chunk, future.result(), strict=True)
        finally:
            for _, future in waiting:
                future.cancel()


def _chunk(entries: Iterator[Entry]) -> list[Entry]:
    """The next entries, up to _CHUNK of them, or fewer where they hold more than _HELD bytes of content."""
    chunk, held = [], 0
    for entry in entries:
        chunk.append(entry)
        held += len(entry.data or b"")
        if len(chunk) == _CHUNK or held > _HELD:
            break
    return chunk


def _scaled(answers: Iterator[Answer], size: int) -> list[Scaled | RejectedImageError]:
    """Scale pictures in groups; those that wait take at most _UNSCALED bytes and one picture more."""
    scaled: list[Scaled | RejectedImageError] = []
    waiting: list[Answer] = []

    def flush() -> None:
        pixels = iter(scale([answer.pixels for answer in waiting if isinstance(answer, Picture)], size))
        for answer in waiting:
            whole = isinstance(answer, Picture)
            scaled.append(Scaled(answer.height, answer.width, answer.notes, next(pixels)) if whole else answer)
        waiting.clear()

    unscaled = 0
    for answer in answers:
        waiting.append(answer)
        unscaled += answer.pixels.nbytes if isinstance(answer, Picture) else 0
        if unscaled > _UNSCALED:
            flush()
            unscaled = 0
    flush()
    return scaled
