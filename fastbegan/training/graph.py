"""A step as one CUDA graph: one launch, after which the device does not wait for Python.

The first three calls run the step as it is, on a side stream; the fourth captures it there and replays; all later calls
replay. Capture runs nothing on the device, so every call is exactly one step.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

# Capture allows no choice of kernels, compilation or lazy state (Adam's moments). The first step does these, the second
# may compile again for the new state, the third lets the allocator settle. torch's graphed callables take three, too.
_WARM_UP = 3


class GraphedStep:
    """Calls `work`, at first as it is, later as a graph. If capture fails, it warns and calls `work` as it is for good.

    Args:
        work: One step. It must read its inputs from tensors at fixed addresses and never wait for the device.
        device: Where `work` runs.
        enabled: False calls `work` as it is from the start, as on a CPU.
        agree: Tells whether its argument is true on all ranks. If one rank cannot capture, none uses a graph: sums over
            ranks inside and outside of graphs cannot meet.
        after: Number of calls, at least, that run `work` as it is before a graph is made.
    """

    def __init__(
        self,
        work: Callable[[], None],
        device: torch.device,
        *,
        enabled: bool = True,
        agree: Callable[[bool], bool] = bool,
        after: int = 0,
    ) -> None:
        self.work, self.device, self._agree = work, device, agree
        self.enabled = enabled and device.type == "cuda"
        self._runs_left = max(_WARM_UP, after) if self.enabled else None  # None: no graph any more
        self._graph: torch.cuda.CUDAGraph | None = None
        # capture is not possible on the default stream; one stream for warm-up too, as each has its own cached memory
        self._stream = torch.cuda.Stream(device) if self.enabled else None

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph."""
        return self._graph is not None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._runs_left is None:
            self.work()
        elif self._runs_left:
            self._runs_left -= 1
            self._on_side_stream(self.work)
        else:
            self._capture()
            self()

    def close(self) -> None:
        """Free the graph; calls run `work` as it is from now on. NCCL cannot shut down while a graph holds its sums."""
        self._runs_left = None
        if self._graph is not None:
            torch.cuda.synchronize(self.device)
            self._graph.reset()
            self._graph = None

    def _on_side_stream(self, work: Callable[[], None]) -> None:
        """Run where capture will run; work before and after it on the current stream keeps its order."""
        assert self._stream is not None
        current = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            work()
        current.wait_stream(self._stream)

    def _capture(self) -> None:
        self._runs_left = None
        torch.cuda.synchronize(self.device)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        current = torch.cuda.current_stream(self.device)
        try:
            # thread_local: calls of CUDA by the loaders' threads are allowed, and not captured
            with torch.cuda.graph(graph, pool, stream=self._stream, capture_error_mode="thread_local"):
                self.work()
        except Exception as error:  # of many types; nothing of the step has run on the device
            # a failed capture may leave the allocator in the graph's pool, and torch 2.7 on the side stream
            self._end_pool(pool)
            torch.cuda.set_stream(current)
            torch.cuda.synchronize(self.device)
            reason = str(_first_cause(error)).strip().partition("\n")[0]
            warnings.warn(f"the step could not be captured as a CUDA graph, going on without: {reason}", stacklevel=4)
        else:
            self._graph = graph
        if not self._agree(self.captured) and self.captured:
            self.close()
            warnings.warn("the step's CUDA graph is not used: another rank could not capture its own", stacklevel=4)

    def _end_pool(self, pool: Any) -> None:
        """Make the allocator leave the graph's pool. Up to torch 2.11 it stays there if ending a capture raises."""
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # the second up to torch 2.7
        end = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
        if end is not None:
            with contextlib.suppress(RuntimeError):  # it has left the pool already
                end(self.device.index or 0, pool)


def _first_cause(error: BaseException) -> BaseException:
    """The error inside a capture. It makes the end of the capture raise too, which hides the cause."""
    cause = error.__context__
    return cause if cause is not None and "captur" in str(error).lower() else error
