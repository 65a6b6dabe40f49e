"""Copies between the host and cards: who waits for whom, and when the values are there.

A copy is done at once, but for one to pinned memory that the host does not wait for: until it does, rubbish lies there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from .captures import capture_on, refuse
from .findings import FINDINGS, NOTE, PAGEABLE, PINNED, PINNED_REUSED, place
from .graphs import Node
from .memory import MEMORY, Borrowed, Record, card_of, is_pinned
from .streams import Stream, current_stream, host_knows, host_waits


def copy_into(target: Tensor, source: Tensor, non_blocking: bool) -> Tensor:
    """`target.copy_(source)` where at least one is on a card, and not both on the same."""
    to, origin = card_of(target), card_of(source)
    if to is None:
        assert origin is not None
        return _to_host(target, source, non_blocking, current_stream(origin))
    if origin is None:
        stream = current_stream(to)
        if (graph := capture_on(stream)) is not None:
            graph.will_write(target)
        _copy(target, source)
        _from_host(target, source, non_blocking, stream)
        return target
    _copy(target, source)
    _between(target, source, to, origin)
    return target


def moved(source: Tensor, to: int | None, non_blocking: bool, options: dict[str, Any]) -> Tensor:
    """A copy of `source` on another device; `options` are those of aten._to_copy."""
    origin = card_of(source)
    if to is None:
        assert origin is not None
        stream = current_stream(origin)
        if (graph := capture_on(stream)) is not None:
            refuse(graph, "copy to the host")
        if non_blocking:
            FINDINGS.note(NOTE, "the copy waits, since the target is not pinned")
        _record(source).use(stream, False)
        host_waits("copy to the host", stream.clock)
        return _copied(source, options)
    stream = current_stream(to)
    graph = capture_on(stream)
    found = _copied(source, options)
    MEMORY.add(found, to, stream, graph)
    if graph is not None:
        graph.adopt(found)
    if origin is None:
        _from_host(found, source, non_blocking, stream)
    else:
        _between(found, source, to, origin)
    return found


def _copied(source: Tensor, options: dict[str, Any]) -> Tensor:
    with _disable_current_modes():
        return torch.ops.aten._to_copy(source, **options)


def _copy(target: Tensor, source: Tensor) -> None:
    with _disable_current_modes(), torch.no_grad():
        target.copy_(source)


def _record(tensor: Tensor) -> Record:
    record = MEMORY.of(tensor)
    assert record is not None
    return record


def _from_host(target: Tensor, source: Tensor, non_blocking: bool, stream: Stream) -> None:
    graph, asynchronous = capture_on(stream), non_blocking and is_pinned(source)
    if graph is not None:
        if not asynchronous:
            refuse(graph, "copy from pageable memory" if not is_pinned(source) else "copy that the host waits for")
        graph.add("host to device", Node(_copy, [graph.pack(target.detach()), Borrowed(source)], {}))
        return
    stream.tick()
    _record(target).use(stream, True)
    what = f"{str(source.dtype).removeprefix('torch.')} {list(source.shape)}"
    if asynchronous:
        FINDINGS.note(PINNED, what)
        _watch(source, stream)
    elif is_pinned(source):
        host_waits(f"copy of {what} from pinned memory", stream.clock)
    else:
        # without non_blocking the host waits for the stream; with it, until the values are in a buffer of the driver's
        FINDINGS.note(PAGEABLE, what)
        if not non_blocking:
            host_knows(stream.clock)


def _watch(source: Tensor, stream: Stream) -> None:
    """What a copy under way reads may not change before the host has waited for it."""
    with _disable_current_modes():
        before, borrowed, where = source.clone(), Borrowed(source), place()

    def compare() -> None:
        with _disable_current_modes():
            now = borrowed.find()  # None: freed, and torch's allocator of pinned memory keeps it until the copy is done
            if now is not None and not torch.equal(now, before):
                FINDINGS.note(PINNED_REUSED, f"{before.dtype} {list(before.shape)} while it was copied", where)

    stream.pending.append((stream.now, compare))


def _to_host(target: Tensor, source: Tensor, non_blocking: bool, stream: Stream) -> Tensor:
    graph, asynchronous = capture_on(stream), non_blocking and is_pinned(target)
    if graph is not None:
        if not asynchronous:
            refuse(graph, "copy to the host")
        graph.add("device to host", Node(_copy, [Borrowed(target), graph.pack(source.detach())], {}))
        return target
    stream.tick()
    _record(source).use(stream, False)
    if not asynchronous:
        host_waits("copy to the host", stream.clock)
        _copy(target, source)
        return target
    with _disable_current_modes():
        values = source.detach().to(target.dtype, copy=True)
        if target.is_contiguous():
            target.detach().view(-1).view(torch.uint8).fill_(0xA5)
    stream.pending.append((stream.now, lambda: _copy(target, values)))
    return target


def _between(target: Tensor, source: Tensor, to: int, origin: int) -> None:
    """A copy from card to card, for which torch lets the streams of both wait for each other."""
    here, there = current_stream(to), current_stream(origin)
    for stream in (here, there):
        if (graph := capture_on(stream)) is not None:
            refuse(graph, "copy between cards (not emulated in captures)")
    for stream, other in ((there, here), (here, there)):
        stream.join(other.clock)
        stream.tick()
    _record(source).use(there, False)
    here.join(there.clock)
    _record(target).use(here, True)
