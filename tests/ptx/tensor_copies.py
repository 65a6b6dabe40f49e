"""Copies of boxes between tensors in global memory, described by tensor maps, and shared memory (TMA)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .mbarrier import Load, key_of
from .operands import Mask, Step, address_of, getter
from .shared_memory import SHARED_BASE
from .syntax import Address, Instruction, Vector

if TYPE_CHECKING:
    from .machine import Machine, Program

SPANS = {0: 0, 1: 32, 2: 64, 3: 128}
"""Bytes of a swizzle's rows, by the number in a tensor map."""


@dataclass(frozen=True)
class TensorMap:
    """Sizes outermost first; strides in values."""

    base: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    size: int  # bytes of a value
    span: int  # of the swizzle, 0 where there is none

    def check(self) -> None:
        """What the hardware wants."""
        assert self.base % 16 == 0 and all(s * self.size % 16 == 0 for s in self.strides[:-1]), self
        assert self.strides[-1] == 1 and max(self.box) <= 256 and len(self.shape) <= 5, self
        inner = self.box[-1] * self.size
        assert inner % 16 == 0 and (not self.span or inner <= self.span), self


class _Store(NamedTuple):
    lane: int
    group: int
    granules: np.ndarray


class TensorStores:
    """Copies from shared memory that may not have read it yet, by their groups."""

    def __init__(self, threads: int) -> None:
        self.commits = np.zeros(threads, np.int64)
        self.reading: list[_Store] = []

    def wait(self, m: Machine, lanes: np.ndarray, left: int) -> None:
        """All but the last `left` groups of these threads are done with shared memory."""
        active, rest = set(lanes.tolist()), []
        for store in self.reading:
            if store.lane in active and store.group < self.commits[store.lane] - left:
                m.shared.end_async_read(m, store.granules, np.array([store.lane]))
            else:
                rest.append(store)
        self.reading = rest


def swizzled(address: np.ndarray, span: int) -> np.ndarray:
    """Which byte of shared memory holds a byte of a tile: 16-byte pieces are exchanged inside rows of 128 bytes."""
    return address ^ (((address >> 7) & (span // 16 - 1)) << 4) if span else address


def build(program: Program, i: Instruction) -> Step:
    """cp.async.bulk.tensor both ways, and the groups and waits of stores."""
    what = i.op[3]
    if what == "commit_group":

        def commit(m: Machine, mask: Mask) -> None:
            m.tensor_stores.commits[m.active(mask)] += 1

        return commit
    if what == "wait_group":
        left = i.number(0)
        return lambda m, mask: m.tensor_stores.wait(m, m.active(mask), left)
    assert what == "tensor", i.text
    return _copy(program, i)


def _copy(program: Program, i: Instruction) -> Step:
    load = i.op[5].startswith("shared")  # the destination comes first
    assert not load or "mbarrier::complete_tx::bytes" in i.op, i.text
    tensor = i.address(1 if load else 0)
    place = address_of(program, i.address(0 if load else 1))
    barrier = address_of(program, i.address(2)) if load else None
    map_at = address_of(program, Address(tensor.base, tensor.offset))
    assert isinstance(tensor.coordinates[0], Vector), i.text
    coordinates = [getter(program, part, "s32") for part in reversed(tensor.coordinates[0].parts)]

    def run(m: Machine, mask: Mask) -> None:
        places, maps = place(m), map_at(m)
        starts = [np.broadcast_to(get(m), m.count) for get in coordinates]
        for lane in map(int, m.active(mask)):
            start = [int(values[lane]) for values in starts]
            key = None if barrier is None else key_of(m, lane, barrier(m)[lane])
            _copy_box(m, lane, m.tensor_maps[int(maps[lane])], start, int(places[lane]), key)

    return run


def _copy_box(
    m: Machine, lane: int, t: TensorMap, start: Sequence[int], place: int, key: tuple[int, int] | None
) -> None:
    """To shared memory where there is a barrier's key, else from there. Outside of the tensor are zeros."""
    assert len(start) == len(t.box), (start, t)
    index = np.indices(t.box).reshape(len(t.box), -1) + np.array(start)[:, None]
    inside = ((index >= 0) & (index < np.array(t.shape)[:, None])).all(0)
    addresses = (t.base + (index * np.array(t.strides)[:, None]).sum(0) * t.size)[inside]
    if place % 128 or (t.span and place % (8 * t.span)):
        m.report_at("shared misaligned", 1, f"tensor copy at {place:#x}, swizzle {t.span}")
    count = index.shape[1]
    linear = np.int64(place) + np.arange(count)[:, None] * t.size + np.arange(t.size)
    places = swizzled(linear, t.span) - SHARED_BASE
    if places.min() < 0 or places.max() >= m.shared.size:
        m.report_at("shared out of bounds", 1, "tensor copy")
        return
    places = places + int(m.cta[lane]) * m.shared.stride
    g, who = places[:, ::2].reshape(-1) // 2, np.array([lane])
    everybody = np.full(len(addresses), lane)
    if key is not None:
        values = np.zeros((count, t.size), np.uint8)
        if len(addresses):
            values[inside] = m.memory.load(m, addresses, t.size, everybody)
        m.shared.note_write(m, g[None, :], who, flight=True, generic=False)
        m.shared.data[places.reshape(-1)] = 0xFF
        m.barriers.loads.append(Load(key, places, values.reshape(-1), lane))
        return
    m.shared.note_async_read(m, g, who)
    if len(addresses):
        m.memory.store(m, addresses, m.shared.data[places][inside], everybody)
    m.tensor_stores.reading.append(_Store(lane, int(m.tensor_stores.commits[lane]), g))
