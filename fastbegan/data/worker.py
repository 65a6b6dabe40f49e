"""A process that decodes files one by one, so that a damaged file can crash only this process.

Protocol between the parent (`workers._Worker`) and this process:
- The parent writes requests to stdin, one line of JSON each: [path, offset, length or null]. Up to SLOTS are pending.
  Behind a request without a path follow its `length` bytes of the picture itself; only one such request is pending.
- The process writes READY once, then an answer per request, in order: a HEAD, then pixels or the bytes of a reason.
- Pixels of request n that fit into a slot go to slot n % SLOTS of the shared memory instead of the pipe.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import struct
import sys

import numpy as np

from .decode import Decoding, RejectedImageError, decode, read_bytes

MEMORY = 400_000_000  # bytes of address space that a process may have ...
PIXEL = 32  # ... and for each pixel of the largest picture: up to eight copies of it, in up to 4 bytes
READY = b"ready\n"
SLOTS = 8  # pending requests, so that the process need not wait for the next one
SLOT = 4 << 20  # bytes
# rows and columns of the crop, height and width of the picture, its notes; for a refused file: 0, the
# length of the reason, and zeros
HEAD = struct.Struct("<5I")


def _limit_memory(max_pixels: int) -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        memory = MEMORY + PIXEL * max_pixels
        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def shared(handle: int) -> np.ndarray:
    """Map the shared memory of a file descriptor: uint8 [SLOTS, SLOT]; no slots for -1."""
    if handle < 0:
        return np.empty((0, 0), np.uint8)
    return np.frombuffer(mmap.mmap(handle, SLOTS * SLOT), np.uint8).reshape(SLOTS, SLOT)


def main(crop: str, max_pixels: str, handle: str) -> None:
    """Answer requests until stdin ends.

    Args:
        crop: As in `decode.Decoding`.
        max_pixels: As in `decode.Decoding`.
        handle: Descriptor of the shared memory, -1 for none.
    """
    decoding = Decoding(crop, int(max_pixels))
    _limit_memory(decoding.max_pixels)
    slots = shared(int(handle))
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print must not mix with answers
    answers.write(READY)
    for number, line in enumerate(iter(sys.stdin.buffer.readline, b"")):
        path, offset, length = json.loads(line)
        try:
            data = read_bytes(path, offset, length) if path else sys.stdin.buffer.read(length)
            picture = decode(data, decoding)
        except RejectedImageError as error:
            reason = str(error).encode(errors="replace")
            answers.write(HEAD.pack(0, len(reason), 0, 0, 0) + reason)
        else:
            pixels = picture.pixels
            rows, columns, _ = pixels.shape
            fits = len(slots) and pixels.size <= SLOT
            if fits:
                slots[number % SLOTS, : pixels.size].reshape(pixels.shape)[:] = pixels
            answers.write(HEAD.pack(rows, columns, picture.height, picture.width, picture.notes))
            if not fits:
                answers.write(np.ascontiguousarray(pixels).data)
