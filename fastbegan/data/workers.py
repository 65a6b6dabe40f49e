"""Decoding in worker processes: strict, bounded in memory and time, results in order; a crash costs one file."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
import threading
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np
import torch

from ..errors import UserError
from .decode import Picture, RejectedImageError
from .scale import scale
from .worker import HEAD, READY

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

_CHUNK = 32  # files that a worker gets at once
_AHEAD = 8  # requests on their way: less than a pipe holds, so that nobody waits for the other
_SECONDS = 60.0  # a chunk's time
_PIPE = 1 << 20  # bytes, the most that Linux gives everybody


class Request(NamedTuple):
    """A file, or `length` bytes of it from `offset`."""

    path: str
    offset: int = 0
    length: int | None = None


Answer = Picture | RejectedImageError


def _exactly(pipe: IO[bytes], length: int) -> np.ndarray:
    """This many bytes, uint8; raises EOFError where the process has ended before."""
    data = np.empty(length, np.uint8)
    view = memoryview(data.data)
    while view and (read := pipe.readinto(view)):  # pyright: ignore[reportAttributeAccessIssue]  # it is unbuffered
        view = view[read:]
    if view:
        raise EOFError
    return data


class _Worker:
    """One process, started again after a crash."""

    def __init__(self, crop: str) -> None:
        self._command = [sys.executable, "-m", f"{__package__}.worker", crop]
        self._process: subprocess.Popen[bytes] | None = None
        self._closed = False

    def close(self) -> None:
        """End for good, in the middle of an answer too."""
        self._closed = True
        self._end()

    def _end(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.wait()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # what was still to be sent
                    pipe.close()  # pyright: ignore[reportOptionalMemberAccess]

    def answer(self, requests: Sequence[Request]) -> list[Answer]:
        """One answer a request."""
        found: list[Answer] = []
        while len(found) < len(requests):
            process = self._started()
            hung = threading.Event()

            def stop(process: subprocess.Popen[bytes] = process, hung: threading.Event = hung) -> None:
                hung.set()
                process.kill()

            clock = threading.Timer(_SECONDS, stop)
            clock.start()
            try:
                self._ask(process, requests[len(found) :], found)
            except (OSError, EOFError, ValueError):  # the first file without an answer is what it died of
                self._end()
                code = process.returncode
                why = f"took more than {_SECONDS:g} seconds" if hung.is_set() else f"its decoder crashed ({code})"
                found.append(RejectedImageError(why))
            finally:
                clock.cancel()
        return found

    def _ask(self, process: subprocess.Popen[bytes], requests: Sequence[Request], found: list[Answer]) -> None:
        assert process.stdin is not None and process.stdout is not None
        lines = [(json.dumps(one) + "\n").encode() for one in requests]
        process.stdin.write(b"".join(lines[:_AHEAD]))
        for number in range(len(lines)):
            found.append(self._read(process.stdout))
            if later := lines[number + _AHEAD : number + _AHEAD + 1]:
                process.stdin.write(later[0])

    def _read(self, pipe: IO[bytes]) -> Answer:
        rows, columns, height, width, converted = HEAD.unpack(_exactly(pipe, HEAD.size).data)
        if not rows:
            return RejectedImageError(_exactly(pipe, columns).tobytes().decode())
        pixels = _exactly(pipe, rows * columns * 3).reshape(rows, columns, 3)
        return Picture(height, width, bool(converted), pixels)

    def _started(self) -> subprocess.Popen[bytes]:
        if self._closed:
            raise RuntimeError("closed")
        if self._process is None:
            paths = os.pathsep.join(path or str(Path.cwd()) for path in sys.path)  # it finds what we found
            single = {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"}  # their stacks count as memory
            self._process = process = subprocess.Popen(
                self._command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0,
                env={**os.environ, **single, "PYTHONPATH": paths},
                start_new_session=True,  # Ctrl-C is for us: a worker that it ended would look like one that crashed
            )  # fmt: skip
            assert process.stdout is not None
            with contextlib.suppress(AttributeError, OSError):  # so that a picture is on its way while one is scaled
                fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, _PIPE)  # pyright: ignore
            try:
                ready = _exactly(process.stdout, len(READY)).tobytes() == READY
            except EOFError:
                ready = False
            if not ready:
                self._end()
                raise UserError(f"decoder processes do not start here: {shlex.join(self._command)} ends at once")
        return self._process


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@dataclass(frozen=True)
class Scaled:
    """A decoded file: height and width as seen, whether it was converted, and its pixels, uint8 [size, size, 3]."""

    height: int
    width: int
    converted: bool
    pixels: np.ndarray


def decode_all(
    requests: Iterable[Request], size: int, crop: str, *, workers: int | None = None
) -> Generator[tuple[Request, Scaled | RejectedImageError]]:
    """Every request with its answer, in order; `workers` processes, one more than there are cores where None.

    Raises UserError where processes cannot be started.
    """
    count = workers or _cores() + 1  # one waits while its pictures are scaled
    waiting, iterator = deque[tuple[list[Request], Future[list[Scaled | RejectedImageError]]]](), iter(requests)
    free: deque[_Worker] = deque(_Worker(crop) for _ in range(count))

    def work(chunk: list[Request]) -> list[Scaled | RejectedImageError]:
        worker = free.pop()  # there are as many threads
        try:
            return _scaled(worker.answer(chunk), size)
        finally:
            free.append(worker)

    with contextlib.ExitStack() as stack:
        # torch's own threads would be one set of them for each of these
        pool = stack.enter_context(ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,)))
        for worker in list(free):  # before the pool waits for its threads
            stack.callback(worker.close)
        try:
            while True:
                while len(waiting) < 4 * count and (chunk := list(islice(iterator, _CHUNK))):
                    waiting.append((chunk, pool.submit(work, chunk)))
                if not waiting:
                    return
                chunk, future = waiting.popleft()
                yield from zip(chunk, future.result(), strict=True)
        finally:
            for _, future in waiting:
                future.cancel()


def _scaled(answers: list[Answer], size: int) -> list[Scaled | RejectedImageError]:
    pixels = iter(scale([one.pixels for one in answers if isinstance(one, Picture)], size))
    return [
        Scaled(one.height, one.width, one.converted, next(pixels)) if isinstance(one, Picture) else one
        for one in answers
    ]
