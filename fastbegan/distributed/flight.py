"""NCCL's flight recorder: the newest sums of a rank over all ranks, for a run that lost a rank."""

from __future__ import annotations

import contextlib
import faulthandler
import os
import threading
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..files import atomic, make_folder

_SUMS = 2000  # the newest that it keeps
_PATIENCE = 5.0  # seconds for a device that may hang


def _bindings() -> Any:
    from torch._C import _distributed_c10d  # absent where torch is built without it

    return _distributed_c10d


def switch_on() -> None:
    """Let NCCL record from its first sum on; before the ranks meet."""
    newer = dist.is_available() and hasattr(_bindings(), "_dump_fr_trace_json")  # torch 2.7 has the older name only
    os.environ.setdefault("TORCH_FR_BUFFER_SIZE" if newer else "TORCH_NCCL_TRACE_BUFFER_SIZE", str(_SUMS))


def write_record(folder: Path, rank: int) -> None:
    """Write `folder`/rank-`rank`.json, where NCCL sums over ranks. If the device hangs, the process ends."""

    def write() -> None:
        text = _bindings()._dump_nccl_trace_json()
        with contextlib.suppress(Exception), atomic(make_folder(folder) / f"rank-{rank}.json") as file:
            file.write(text if isinstance(text, bytes) else text.encode())

    if dist.is_initialized() and "nccl" in dist.get_backend_config():
        faulthandler.dump_traceback_later(2 * _PATIENCE, exit=True)  # the call may hold Python's lock
        thread = threading.Thread(target=write, daemon=True)
        thread.start()
        thread.join(_PATIENCE)
        faulthandler.cancel_dump_traceback_later()
