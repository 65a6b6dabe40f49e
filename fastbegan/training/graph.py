"""A step as one CUDA graph: the device does it without waiting for Python, in one launch."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable
from typing import Any

import torch

_WARM_UP = 3  # steps that run as they are: kernels are chosen, torch.compile and cuDNN settle


class GraphedStep:
    """Calls `work`, first as it is, then as a graph replayed on the same stream and memory.

    `work` must read what changes from tensors that stay where they are, and must not wait for the device. Every call is
    one run of it: the warm-up's too. Where capture fails, a warning says why and `work` goes on as it is.
    """

    def __init__(
        self,
        work: Callable[[], None],
        device: torch.device,
        *,
        enabled: bool = True,
        agree: Callable[[bool], bool] = bool,
    ) -> None:
        """`agree` says whether all ranks captured theirs: sums of a graph meet no sums of work as it is."""
        self.work, self.device, self._agree = work, device, agree
        self.enabled = enabled and device.type == "cuda"
        self._runs_left = _WARM_UP if self.enabled else None
        self._graph: torch.cuda.CUDAGraph | None = None
        # one for warm-up and capture, so that memory settles once; on our device, whichever is current
        self._stream = torch.cuda.Stream(device) if self.enabled else None

    @property
    def captured(self) -> bool:
        """Whether calls replay a graph by now."""
        return self._graph is not None

    def __call__(self) -> None:
        if self._graph is not None:
            self._graph.replay()
        elif self._runs_left is None:
            self.work()
        elif self._runs_left:
            self._runs_left -= 1
            self._beside(self.work)
        else:
            self._capture()
            self()

    def close(self) -> None:
        """Give up the graph: NCCL does not let go of ranks whose sums a graph holds."""
        self._runs_left = None
        if self._graph is not None:
            torch.cuda.synchronize(self.device)
            self._graph.reset()
            self._graph = None

    def _beside(self, work: Callable[[], None]) -> None:
        """Run on a stream of its own, as capture will: what settles there settles for it."""
        assert self._stream is not None
        here = torch.cuda.current_stream(self.device)
        self._stream.wait_stream(here)
        with torch.cuda.stream(self._stream):
            work()
        here.wait_stream(self._stream)

    def _capture(self) -> None:
        self._runs_left = None
        torch.cuda.synchronize(self.device)
        graph, pool = torch.cuda.CUDAGraph(), torch.cuda.graph_pool_handle()
        here = torch.cuda.current_stream(self.device)
        try:
            # what loaders' threads do meanwhile is not part of it, and no reason to fail
            with torch.cuda.graph(graph, pool, stream=self._stream, capture_error_mode="thread_local"):
                self.work()
        except Exception as error:  # torch raises many types here; nothing of the step was run
            self._end_pool(pool)
            torch.cuda.set_stream(here)  # where ending the capture raised, torch 2.7 stays on the other one
            torch.cuda.synchronize(self.device)
            reason = str(_first_cause(error)).strip().partition("\n")[0]
            warnings.warn(f"the step could not be captured as a CUDA graph, going on without: {reason}", stacklevel=4)
        else:
            self._graph = graph
        if not self._agree(self.captured) and self.captured:
            self.close()
            warnings.warn("the step's CUDA graph is not used: another rank could not capture its own", stacklevel=4)

    def _end_pool(self, pool: Any) -> None:
        """Where ending a broken capture raised, torch up to 2.11 goes on taking memory from the graph's pool."""
        names = ("_cuda_endAllocateToPool", "_cuda_endAllocateCurrentStreamToPool")  # the second up to torch 2.7
        end = next((getattr(torch._C, name) for name in names if hasattr(torch._C, name)), None)
        if end is not None:
            with contextlib.suppress(RuntimeError):  # it had ended
                end(self.device.index or 0, pool)


def _first_cause(error: BaseException) -> BaseException:
    """What went wrong inside a capture: its end raises too, then, and says nothing of why."""
    inside = error.__context__
    return inside if inside is not None and "captur" in str(error).lower() else error
