"""Launches of Triton's interpreter: on which card and stream, and into which graph."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .captures import capture_on
from .devices import THREAD
from .findings import FINDINGS, MIXED
from .graphs import CUDAGraph, Node
from .memory import MEMORY, Record, card_of, raw_bytes
from .streams import Stream, current_stream


def patch() -> None:
    """Replace the interpreter's launch."""
    try:
        from triton.runtime import interpreter
    except ImportError:
        return
    launch = interpreter.GridExecutor.__call__

    def launched(self: Any, *args: Any, **kwargs: Any) -> None:
        tensors = [tensor for value in (*args, *kwargs.values()) for tensor in _pointers(value)]
        if all(card_of(tensor) is None for tensor in tensors):
            return launch(self, *args, **kwargs)
        name = getattr(self.fn, "__name__", str(self.fn))
        _require_current_card(name, tensors)
        FINDINGS.launches[name] += 1

        def run(*args: Any, **kwargs: Any) -> None:
            with _disable_current_modes(), torch.no_grad():
                THREAD.raw += 1
                try:
                    launch(self, *map(_unpacked, args), **{key: _unpacked(value) for key, value in kwargs.items()})
                finally:
                    THREAD.raw -= 1

        stream = current_stream()
        graph = capture_on(stream)
        if graph is None:
            _run_now(run, args, kwargs, tensors, stream)
        else:
            _capture(graph, name, run, args, kwargs, tensors)
        return None

    interpreter.GridExecutor.__call__ = launched


def _require_current_card(name: str, tensors: list[Tensor]) -> None:
    """Triton launches on the current card, which does not reach the memory of others."""
    for tensor in tensors:
        card = card_of(tensor)
        if card is None:
            FINDINGS.note(MIXED, f"{name}: a pointer to the host's memory")
            raise ValueError("Pointer argument (at ?) cannot be accessed from Triton (cpu tensor?)")
        if card != THREAD.card:
            FINDINGS.note(MIXED, f"{name}: launched on cuda:{THREAD.card} with memory of cuda:{card}")
            raise RuntimeError("Triton Error [CUDA]: an illegal memory access was encountered")


def _run_now(run: Any, args: Any, kwargs: Any, tensors: list[Tensor], stream: Stream) -> None:
    records: dict[int, tuple[Record, Any, Any]] = {}
    for tensor in tensors:
        storage, record = tensor.untyped_storage(), MEMORY.of(tensor)
        if record is not None and record.key not in records:
            with _disable_current_modes():
                records[record.key] = record, storage, storage.clone()
    run(*args, **kwargs)
    stream.tick()
    for record, storage, before in records.values():
        with _disable_current_modes():  # what a kernel writes is known from what changed
            changed = not torch.equal(raw_bytes(storage), raw_bytes(before))
        record.use(stream, changed)


def _capture(graph: CUDAGraph, name: str, run: Any, args: Any, kwargs: Any, tensors: list[Tensor]) -> None:
    for tensor in tensors:
        graph.will_write(tensor)
    given = [_packed(graph, value) for value in args]
    options = {key: _packed(graph, value) for key, value in kwargs.items()}
    graph.add(name, Node(run, given, options))
    run(*args, **kwargs)


def _is_descriptor(value: Any) -> bool:
    return type(value).__name__ == "TensorDescriptor"


def _pointers(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [value.base] if _is_descriptor(value) else []


def _packed(graph: CUDAGraph, value: Any) -> Any:
    """An argument for a graph's log; a descriptor as a tuple of its tensor and the rest."""
    return (graph.pack(value.base), value) if _is_descriptor(value) else graph.pack(value)


def _unpacked(value: Any) -> Any:
    if type(value) is tuple and len(value) == 2 and _is_descriptor(value[1]):
        return dataclasses.replace(value[1], base=value[0])
    return value
