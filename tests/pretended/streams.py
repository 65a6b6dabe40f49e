"""Streams and events. All work is done at once; vector clocks keep what a GPU would know to be done.

A stream counts its work. Its clock says, for every stream, up to which count it is sure to come later: its own count,
and what it has waited for. `HOST` says the same of the host.
"""

from __future__ import annotations

import os
import time
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .captures import UNDER_WAY, capture_of_thread, capture_on, refuse, require_no_capture
from .devices import CARDS, DEVICES, THREAD, index_of
from .findings import EVENT, FINDINGS, SYNCHRONIZE, WAIT

if TYPE_CHECKING:
    from .graphs import CUDAGraph

Clock = dict["Stream", int]
HOST: Clock = {}
_LATENCY = int(os.environ.get("PRETENDED_LATENCY") or 1)
_every: weakref.WeakSet[Stream] = weakref.WeakSet()


class Stream:
    """torch.cuda.Stream."""

    _made = 0

    def __init__(self, device: Any = None, priority: int = 0, **_: Any) -> None:
        self.device_index = index_of(device)
        self.device, self.priority = DEVICES[self.device_index], priority
        Stream._made += 1
        self.stream_id = self.cuda_stream = Stream._made
        self.now = 0
        self.clock: Clock = {}
        self.pending: list[tuple[int, Callable[[], None]]] = []  # what happens once the host knows that count done
        self._context: StreamContext | None = None
        _every.add(self)

    def __repr__(self) -> str:
        return f"stream {self.stream_id} of {self.device}"

    def tick(self) -> None:
        """Work was queued."""
        self.now += 1
        self.clock[self] = self.now

    def join(self, clock: Clock) -> None:
        """What comes next comes after this."""
        for stream, when in clock.items():
            self.clock[stream] = max(self.clock.get(stream, 0), when)

    def is_after(self, stream: Stream, when: int) -> bool:
        """Whether what comes next here is sure to come after that work of another stream."""
        return stream is self or self.clock.get(stream, 0) >= when or HOST.get(stream, 0) >= when

    def wait_stream(self, stream: Stream) -> None:
        self.wait_event(stream.record_event())

    def wait_event(self, event: Event) -> None:
        if event.stream is None:
            return  # never recorded: nothing to wait for, as in CUDA
        here, there = capture_on(self), event.capture if event.capture in UNDER_WAY else None
        if there is not None and here is None:
            if capture_of_thread() is not there:
                refuse(there, "wait for a capture's event outside of it")
            there.streams.add(self)  # a stream that waits for a capture's event joins it
        elif here is not None and here is not event.capture:
            refuse(here, "wait for an event from before the capture", "dependency created on uncaptured work")
        self.join(event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        host_waits("Stream.synchronize", self.clock, SYNCHRONIZE)

    def query(self) -> bool:
        require_no_capture("Stream.query")
        return all(HOST.get(stream, 0) >= when for stream, when in self.clock.items())

    def is_capturing(self) -> bool:
        return capture_on(self) is not None

    def __enter__(self) -> Stream:
        self._context = StreamContext(self)
        self._context.__enter__()
        return self

    def __exit__(self, *reason: object) -> None:
        assert self._context is not None
        self._context.__exit__(*reason)


_DEFAULTS = [Stream(number) for number in range(len(CARDS))]


def default_stream(device: Any = None) -> Stream:
    return _DEFAULTS[index_of(device)]


def current_stream(device: Any = None) -> Stream:
    index = index_of(device)
    return THREAD.streams.get(index, _DEFAULTS[index])


def set_stream(stream: Stream | None) -> None:
    if stream is not None:
        THREAD.card = stream.device_index
        THREAD.streams[stream.device_index] = stream


class StreamContext:
    """torch.cuda.stream: the stream's card is current meanwhile, too."""

    def __init__(self, stream: Stream | None) -> None:
        self.stream = stream
        self._before: list[Stream] = []

    def __enter__(self) -> None:
        if self.stream is not None:
            self._before = [current_stream(self.stream.device), current_stream()]
            set_stream(self.stream)

    def __exit__(self, *reason: object) -> None:
        for stream in self._before:
            set_stream(stream)


class Event:
    """torch.cuda.Event."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self._timed = enable_timing
        self.stream: Stream | None = None
        self.capture: CUDAGraph | None = None
        self.clock: Clock = {}
        self._asked, self._seconds = 0, 0.0

    def record(self, stream: Stream | None = None) -> None:
        stream = current_stream() if stream is None else stream
        if self.stream is not None and self.stream.device_index != stream.device_index:
            ours, theirs = self.stream.device_index, stream.device_index
            raise RuntimeError(f"Event device {ours} does not match recording stream's device {theirs}.")
        self.capture = capture_on(stream)
        if self.capture is not None and self._timed:
            refuse(self.capture, "an event with timing")
        stream.tick()
        self.stream, self.clock = stream, dict(stream.clock)
        self._asked, self._seconds = 0, time.perf_counter()

    def wait(self, stream: Stream | None = None) -> None:
        (current_stream() if stream is None else stream).wait_event(self)

    def synchronize(self) -> None:
        self._require_outside("Event.synchronize")
        if self.stream is not None:
            host_waits("Event.synchronize", self.clock, EVENT)

    def query(self) -> bool:
        self._require_outside("Event.query")
        self._asked += 1
        if self._asked <= _LATENCY and not self._is_past():
            return False
        host_knows(self.clock)
        return True

    def elapsed_time(self, other: Event) -> float:
        if not (self._timed and other._timed):
            raise ValueError("Both events must be created with argument 'enable_timing=True'.")
        if self.stream is None or other.stream is None:
            raise ValueError("Both events must be recorded before calculating elapsed time.")
        if not (self._is_past() and other._is_past()):
            raise torch.AcceleratorError("CUDA error: device not ready")
        return max(1e-6, (other._seconds - self._seconds) * 1e3)

    def _is_past(self) -> bool:
        return all(HOST.get(stream, 0) >= when for stream, when in self.clock.items())

    def _require_outside(self, what: str) -> None:
        require_no_capture(what)
        if self.capture is not None and self.capture in UNDER_WAY:
            refuse(self.capture, what)


def host_knows(clock: Clock) -> None:
    """All of `clock` is done, and the host knows."""
    for stream, when in list(clock.items()):
        done = HOST[stream] = max(HOST.get(stream, 0), when)
        due = [action for moment, action in stream.pending if moment <= done]
        stream.pending = [one for one in stream.pending if one[0] > done]
        for action in due:
            action()


def host_waits(what: str, clock: Clock, kind: str = WAIT) -> None:
    """The host waits for this work of a device."""
    require_no_capture(what)
    FINDINGS.note(kind, what)
    host_knows(clock)


def synchronize(device: Any = None) -> None:
    """torch.cuda.synchronize. CUDA refuses it in any thread while a stream of the card is captured."""
    index = index_of(device)
    for graph in UNDER_WAY:
        if any(stream.device_index == index for stream in graph.streams):
            refuse(graph, "torch.cuda.synchronize")
    host_waits(
        "torch.cuda.synchronize", {one: one.now for one in list(_every) if one.device_index == index}, SYNCHRONIZE
    )
