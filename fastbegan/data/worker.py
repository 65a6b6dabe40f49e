"""A process that decodes files one after another: what damaged ones do to it, they do to nobody else.

Requests are lines of JSON, [path, offset, length or null]; an answer is a HEAD and as many bytes as it says. Pixels
that fit into a slot of the memory that both processes share are left there, those of request n in slot n % SLOTS.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import sys

import numpy as np

from .decode import RejectedImageError, decode, read_bytes

MEMORY = 1_000_000_000  # bytes of address space
READY = b"ready\n"
SLOTS = 8  # requests that may be on their way
SLOT = 4 << 20  # bytes
# rows and columns of the pixels that follow, height and width of the picture, whether it was converted; or, where there
# are no rows, how many bytes of a reason follow
HEAD = struct.Struct("<5I")


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def shared(handle: int) -> np.ndarray:
    """The shared memory of this file descriptor, uint8 [SLOTS, SLOT]; no slots for -1."""
    if handle < 0:
        return np.empty((0, 0), np.uint8)
    return np.frombuffer(mmap.mmap(handle, SLOTS * SLOT), np.uint8).reshape(SLOTS, SLOT)


def main(crop: str, handle: str) -> None:
    """Answer requests until there are no more; `handle` is that of the shared memory, -1 for none."""
    _limit_memory()
    slots = shared(int(handle))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no answer
    answers.write(READY)
    for number, line in enumerate(sys.stdin.buffer):
        path, offset, length = json.loads(line)
        try:
            picture = decode(read_bytes(path, offset, length), crop)
        except RejectedImageError as error:
            reason = str(error).encode(errors="replace")
            answers.write(HEAD.pack(0, len(reason), 0, 0, 0) + reason)
        else:
            pixels = picture.pixels
            rows, columns, _ = pixels.shape
            fits = len(slots) and pixels.size <= SLOT
            if fits:
                slots[number % SLOTS, : pixels.size].reshape(pixels.shape)[:] = pixels
            answers.write(HEAD.pack(rows, columns, picture.height, picture.width, picture.converted))
            if not fits:
                answers.write(np.ascontiguousarray(pixels).data)
