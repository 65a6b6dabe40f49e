"""Whose memory is whose: a record for each storage of a card, and for pinned memory.

A record holds a weak reference to its storage. It tells when the memory was freed, and keeps the storage's number from
being another one's.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from .devices import CARDS, THREAD
from .findings import FINDINGS, FREED_EARLY, GRAPH_READS_FREED, RACE, place
from .streams import Stream

if TYPE_CHECKING:
    from .graphs import CUDAGraph

_real_device = torch._C.TensorBase.device.__get__  # pyright: ignore[reportAttributeAccessIssue]
_empty = torch.empty


def is_host(tensor: Tensor) -> bool:
    """Whether a tensor really lies in the CPU's memory, as those of cards do: not on meta."""
    return _real_device(tensor).type == "cpu"


def raw_tensor(storage: Any, dtype: torch.dtype, offset: Any, size: Any, stride: Any) -> Tensor:
    """A view of a storage that no dispatch mode sees."""
    return _empty(0, dtype=dtype).set_(storage, offset, size, stride)


def raw_bytes(storage: Any) -> Tensor:
    return _empty(0, dtype=torch.uint8).set_(storage)


class Record:
    """What is known of a storage. `card` is None for pinned memory, `graph` the capture whose pool it came from."""

    __slots__ = (
        "born",
        "bytes",
        "card",
        "graph",
        "key",
        "reads",
        "recorded",
        "reference",
        "stream",
        "used_at",
        "writes",
    )

    def __init__(self, storage: Any, card: int | None, stream: Stream | None, graph: CUDAGraph | None) -> None:
        self.reference, self.key, self.bytes = StorageWeakRef(storage), storage._cdata, storage.nbytes()
        self.card, self.stream, self.graph = card, stream, graph
        self.born = 0 if stream is None else stream.now
        self.reads: dict[Stream, int] = {}
        self.writes: dict[Stream, int] = {}
        self.recorded: set[Stream] = set()
        self.used_at = ""

    def use(self, stream: Stream, write: bool) -> None:
        """A stream reads or writes this memory: it must have waited for whoever did so before."""
        home = self.stream
        if self.card is None or home is None:
            return
        doing = "write" if write else "read"
        for other, when in self.writes.items():
            if not stream.is_after(other, when):
                FINDINGS.note(RACE, f"{doing} on {stream} after a write on {other}, without a wait")
        if write:
            for other, when in self.reads.items():
                if not stream.is_after(other, when):
                    FINDINGS.note(RACE, f"write on {stream} after a read on {other}, without a wait")
            self.writes, self.reads = {stream: stream.now}, {}
        else:
            self.reads[stream] = stream.now
        if stream is not home:
            self.used_at = place()
            MEMORY.away.add(self)

    def busy_for(self, home: Stream) -> Stream | None:
        """A stream whose use of this memory `home` has not waited for, and the allocator was not told of."""
        for uses in (self.reads, self.writes):
            for stream, when in uses.items():
                if stream not in self.recorded and not home.is_after(stream, when):
                    return stream
        return None


class Memory:
    """All records by the number of their storage, and how much of each card is used."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self.records: dict[int, Record] = {}
        self.away: set[Record] = set()  # used on other streams than the one they came from
        self.used = [0] * len(CARDS)
        self.peak = [0] * len(CARDS)
        self.limit = [card.memory for card in CARDS]

    def of(self, tensor: Tensor) -> Record | None:
        try:
            return self.records.get(tensor.untyped_storage()._cdata)
        except (RuntimeError, NotImplementedError):  # functional and fake tensors have none
            return None

    def add(self, tensor: Tensor, card: int | None, stream: Stream | None, graph: CUDAGraph | None = None) -> Record:
        """A new storage of a card (None: pinned), from the allocator's pool of a stream, or from a graph's own."""
        storage = tensor.untyped_storage()
        with self._lock:
            if (found := self.records.get(storage._cdata)) is not None:
                return found
            record = Record(storage, card, stream, graph)
            if card is not None:
                self._take(card, record.bytes)
                self._look_for_early(stream, graph)
            self.records[record.key] = record
            return record

    def _take(self, card: int, size: int) -> None:
        if self.used[card] + size > min(self.peak[card], self.limit[card]):
            self.purge()
        if self.used[card] + size > self.limit[card]:
            free, total = self.limit[card] - self.used[card], self.limit[card]
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {size / 2**20:.2f} MiB. GPU {card} has a total capacity of "
                f"{total / 2**20:.2f} MiB of which {free / 2**20:.2f} MiB is free."
            )
        self.used[card] += size
        self.peak[card] = max(self.peak[card], self.used[card])

    def _look_for_early(self, home: Stream | None, graph: CUDAGraph | None) -> None:
        """The allocator may give what was freed to whoever asks on the same stream, though another one is at it."""
        for record in [one for one in self.away if one.stream is home and one.graph is graph]:
            stream = None if home is None else record.busy_for(home)
            if stream is None:
                self.away.discard(record)
            elif record.reference.expired():
                self.away.discard(record)
                what = f"{record.bytes} bytes of {home} were given away while {stream} used them"
                FINDINGS.note(FREED_EARLY, what, record.used_at)

    def purge(self) -> None:
        """Take note of what was freed."""
        with self._lock:
            for key in [key for key, record in self.records.items() if record.reference.expired()]:
                record = self.records.pop(key)
                if record.card is not None:
                    self.used[record.card] -= record.bytes


MEMORY = Memory()


def card_of(tensor: Any) -> int | None:
    """The card that a tensor is on, None for the host's."""
    if THREAD.raw or not isinstance(tensor, Tensor):
        return None
    record = MEMORY.of(tensor)
    return None if record is None or not is_host(tensor) else record.card


def is_pinned(tensor: Tensor) -> bool:
    record = MEMORY.of(tensor)
    return record is not None and record.card is None


class Borrowed:
    """A tensor that a graph does not keep: its memory was there before the capture."""

    __slots__ = ("dtype", "offset", "record", "reference", "size", "stride")

    def __init__(self, tensor: Tensor) -> None:
        self.reference, self.record = StorageWeakRef(tensor.untyped_storage()), MEMORY.of(tensor)
        self.dtype, self.offset = tensor.dtype, tensor.storage_offset()
        self.size, self.stride = tensor.size(), tensor.stride()

    def find(self) -> Tensor | None:
        """The tensor; None where its memory was freed."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self.reference.cdata)
        return None if storage is None else raw_tensor(storage, self.dtype, self.offset, self.size, self.stride)

    def get(self) -> Tensor:
        """The tensor. Raises RuntimeError where its memory was freed, which on a GPU would read anything."""
        found = self.find()
        if found is None:
            what = f"{self.dtype} {list(self.size)}"
            FINDINGS.note(GRAPH_READS_FREED, what)
            raise RuntimeError(f"{GRAPH_READS_FREED}: {what}")
        return found
