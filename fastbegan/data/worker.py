"""A process that decodes files one after another: what damaged ones do to it, they do to nobody else.

Requests are lines of JSON, [path, offset, length or null]; an answer is a HEAD and as many bytes as it says.
"""

from __future__ import annotations

import contextlib
import json
import os
import struct
import sys

import numpy as np

from .decode import RejectedImageError, decode, read_bytes

MEMORY = 1_000_000_000  # bytes of address space
READY = b"ready\n"
# rows and columns of the pixels that follow, height and width of the picture, whether it was converted; or, where there
# are no rows, how many bytes of a reason follow
HEAD = struct.Struct("<5I")


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(crop: str) -> None:
    """Answer requests until there are no more."""
    _limit_memory()
    answers = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what libraries print is no answer
    answers.write(READY)
    for line in sys.stdin.buffer:
        path, offset, length = json.loads(line)
        try:
            picture = decode(read_bytes(path, offset, length), crop)
        except RejectedImageError as error:
            reason = str(error).encode(errors="replace")
            answers.write(HEAD.pack(0, len(reason), 0, 0, 0) + reason)
        else:
            rows, columns, _ = picture.pixels.shape
            answers.write(HEAD.pack(rows, columns, picture.height, picture.width, picture.converted))
            answers.write(np.ascontiguousarray(picture.pixels).data)
