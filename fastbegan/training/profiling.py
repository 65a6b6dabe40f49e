"""`--profile N`: what N steps of a run do, as a trace of torch.profiler and, on a GPU, a snapshot of its memory."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.profiler import profile, record_function, schedule

from ..files import make_folder

_WARM_UP = 1  # steps that torch.profiler discards: starting it takes time
_ALLOCATIONS = 100_000  # the newest ones that a snapshot of memory has


@contextlib.contextmanager
def named(part: str) -> Iterator[None]:
    """Name a part of a step in traces of torch.profiler and, as an NVTX range, of Nsight Systems."""
    on_gpu = torch.cuda.is_initialized()
    with record_function(part), torch.cuda.nvtx.range(part) if on_gpu else contextlib.nullcontext():
        yield


def steps_before_graph(steps: int, skipped: int) -> int:
    """Steps until a trace of `steps` steps is written: they are no CUDA graph, in which parts would have no names."""
    return skipped + _WARM_UP + steps if steps else 0


class Profile:
    """Traces `steps` steps of this process, after its first `skipped`, into `folder`; 0 for nothing.

    It writes `trace.json`, for Perfetto or chrome://tracing, and on a GPU `memory.pickle`, for pytorch.org/memory_viz.
    """

    def __init__(
        self, steps: int, skipped: int, folder: Path, device: torch.device, say: Callable[[str], None]
    ) -> None:
        self._folder, self._say, self._on_gpu = folder, say, device.type == "cuda"
        self._left = steps_before_graph(steps, skipped)
        self._profiler: profile | None = None
        if steps:
            times = schedule(skip_first=skipped, wait=0, warmup=_WARM_UP, active=steps, repeat=1)
            self._profiler = profile(schedule=times, record_shapes=True)

    def begin(self) -> None:
        """Training begins."""
        if self._profiler is not None:
            self._profiler.start()
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS, stacks="python")

    @property
    def ends(self) -> bool:
        """Whether the step that was just done is the last of the trace, so that `write` is due."""
        return self._profiler is not None and self._left == 1

    def step(self) -> None:
        """A step is done."""
        if self._profiler is not None:
            self._left -= 1
            self._profiler.step()

    def write(self) -> None:
        """Write the files."""
        assert self._profiler is not None
        profiler, self._profiler = self._profiler, None
        make_folder(self._folder)
        profiler.stop()
        profiler.export_chrome_trace(str(self._folder / "trace.json"))
        if self._on_gpu:
            torch.cuda.memory._dump_snapshot(str(self._folder / "memory.pickle"))
            torch.cuda.memory._record_memory_history(enabled=None)
        self._say(f"profile    {self._folder}")

    def close(self) -> None:
        """Training has ended."""
        if self._profiler is not None:
            self._say(f"warning: no profile was written; the run ended {self._left} steps too early for it")
            self._profiler.stop()
            if self._on_gpu:
                torch.cuda.memory._record_memory_history(enabled=None)
