"""CUDA graphs: what is captured is logged, done once for its shapes, and put back; a replay does what the log says."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import _disable_current_modes

from .captures import UNDER_WAY, require_no_capture
from .findings import FINDINGS, NOTE
from .memory import MEMORY, Borrowed, Record, card_of, is_pinned, raw_bytes
from .streams import Stream, StreamContext, current_stream, default_stream, synchronize


@dataclass(frozen=True)
class Node:
    """One piece of work. `outputs` are the tensors that were new at capture, None for those that were not."""

    run: Callable[..., Any]
    arguments: Sequence[Any]
    options: dict[str, Any]
    outputs: Sequence[Tensor | None] = ()


def flat(value: Any, found: list[Tensor] | None = None) -> list[Tensor]:
    """All tensors in nested lists and tuples."""
    found = [] if found is None else found
    if isinstance(value, Tensor):
        found.append(value)
    elif isinstance(value, (list, tuple)):
        for one in value:
            flat(one, found)
    elif isinstance(value, dict):
        for one in value.values():
            flat(one, found)
    return found


class CUDAGraph:
    """torch.cuda.CUDAGraph."""

    def __init__(self, keep_graph: bool = False, **_: Any) -> None:
        self.streams: set[Stream] = set()  # those that are captured
        self.thread: int | None = None
        self.mode = "global"
        self.broken = False
        self._stream: Stream | None = None  # that the capture began on
        self._nodes: list[Node] | None = None
        self._log: list[Node] = []
        self._names: Counter[str] = Counter()
        self._saved: dict[int, tuple[StorageWeakRef, Any]] = {}  # memory from before, as it was
        self._pool: dict[int, StorageWeakRef] = {}  # memory of its own, which it keeps
        self._written: set[int] = set()

    def capture_begin(self, pool: Any = None, capture_error_mode: str = "global", **_: Any) -> None:
        stream = current_stream()
        if stream is default_stream(stream.device):
            raise RuntimeError("CUDA graphs must be captured on a non-default stream.")
        require_no_capture("a capture inside of another")
        self.mode, self.thread = capture_error_mode, threading.get_ident()
        self.streams, self._stream, self.broken = {stream}, stream, False
        UNDER_WAY.append(self)

    def capture_end(self) -> None:
        if current_stream() is not self._stream:
            raise RuntimeError("Capture must end on the same stream it began on.")
        UNDER_WAY.remove(self)
        with _disable_current_modes():
            for reference, saved in self._saved.values():  # nothing of it was done
                if (storage := _storage(reference)) is not None:
                    storage.copy_(saved)
            for reference in self._pool.values():
                if (storage := _storage(reference)) is not None:
                    raw_bytes(storage).fill_(0xFF)  # who reads it before the first replay gets NaN
        self._written, self._saved = set(self._saved), {}
        nodes, self._log = self._log, []
        if self.broken:
            raise torch.AcceleratorError("CUDA error: operation failed due to a previous error during capture")
        self._nodes = nodes
        FINDINGS.graphs.append(dict(self._names))

    def replay(self) -> None:
        if self._nodes is None:
            raise RuntimeError("Called CUDAGraph::replay without a preceding successful capture.")
        require_no_capture("CUDAGraph.replay")
        stream = current_stream()
        stream.tick()
        used: dict[int, Record] = {}
        with _disable_current_modes(), torch.no_grad():
            for node in self._nodes:
                arguments = [_given(value, used) for value in node.arguments]
                found = flat(
                    node.run(*arguments, **{name: _given(value, used) for name, value in node.options.items()})
                )
                for output, new in zip(node.outputs, found, strict=bool(node.outputs)):
                    if output is not None:
                        output.copy_(new)
        for record in used.values():
            record.use(stream, record.key in self._written)

    def reset(self) -> None:
        self._nodes = None
        self._pool = {}

    def pool(self) -> tuple[int, int]:
        return (0, id(self))

    def enable_debug_mode(self) -> None:
        pass

    def instantiate(self) -> None:
        pass

    def add(self, name: str, node: Node) -> None:
        self._names[name] += 1
        self._log.append(node)

    def will_write(self, tensor: Tensor) -> None:
        """Keep what memory from before the capture holds."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._pool and key not in self._saved:
            with _disable_current_modes():
                self._saved[key] = StorageWeakRef(storage), storage.clone()

    def adopt(self, tensor: Tensor) -> None:
        """A storage that was allocated in the capture."""
        storage = tensor.untyped_storage()
        self._pool[storage._cdata] = StorageWeakRef(storage)

    def pack(self, value: Any) -> Any:
        """An argument as a node keeps it: memory of its own for good, other memory as an address only."""
        if type(value) in (list, tuple):
            return type(value)(self.pack(one) for one in value)
        if not isinstance(value, Tensor):
            return value
        if card_of(value) is not None:
            own = value.untyped_storage()._cdata in self._pool
            return value.detach() if own else Borrowed(value)
        if is_pinned(value):
            return Borrowed(value)
        if value.dim() == 0:
            FINDINGS.note(NOTE, "a number of the host's in a graph: every replay takes the one of the capture")
        with _disable_current_modes():
            return value.clone()


def _storage(reference: StorageWeakRef) -> Any:
    return torch.UntypedStorage._new_with_weak_ptr(reference.cdata)


def _given(value: Any, used: dict[int, Record]) -> Any:
    """What `pack` made of an argument, as tensors again; notes the memory that the graph does not own."""
    if isinstance(value, Borrowed):
        if value.record is not None:
            used[value.record.key] = value.record
        return value.get()
    if type(value) in (list, tuple):
        return type(value)(_given(one, used) for one in value)
    return value


class graph:
    """torch.cuda.graph, in the order of the real one."""

    default_capture_stream: Stream | None = None

    def __init__(
        self,
        cuda_graph: CUDAGraph,
        pool: Any = None,
        stream: Stream | None = None,
        capture_error_mode: str = "global",
        **_: Any,
    ) -> None:
        if stream is None and graph.default_capture_stream is None:
            graph.default_capture_stream = Stream()
        self.capture_stream = stream or graph.default_capture_stream
        self.stream_ctx, self.cuda_graph, self._mode = (
            StreamContext(self.capture_stream),
            cuda_graph,
            capture_error_mode,
        )

    def __enter__(self) -> None:
        synchronize()
        gc.collect()
        MEMORY.purge()
        self.stream_ctx.__enter__()
        self.cuda_graph.capture_begin(capture_error_mode=self._mode)

    def __exit__(self, *reason: object) -> None:
        try:
            self.cuda_graph.capture_end()
        finally:
            self.stream_ctx.__exit__(*reason)
