"""A process that decodes files one after another: what damaged ones do to it, they do to nobody else.

Requests are lines of JSON, [path, offset, length or null], answers a line of JSON and then the pixels' bytes.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys

from .decode import RejectedImageError, decode, read_bytes

MEMORY = 1_000_000_000  # bytes of address space
READY = b"ready\n"


def _limit_memory() -> None:
    with contextlib.suppress(ImportError, ValueError, OSError):  # Windows has no such limits
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def main(size: int, crop: str) -> None:
    """Answer requests until there are no more."""
    _limit_memory()
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print is no answer
    answers.write(READY)
    answers.flush()
    for line in sys.stdin.buffer:
        path, offset, length = json.loads(line)
        try:
            picture = decode(read_bytes(path, offset, length), size, crop)
        except RejectedImageError as error:
            answers.write(json.dumps({"rejected": str(error)}).encode() + b"\n")
        else:
            seen = {"height": picture.height, "width": picture.width, "converted": picture.converted}
            answers.write(json.dumps(seen).encode() + b"\n" + picture.pixels.tobytes())
        answers.flush()


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
