"""Shared memory. Every access is checked for bounds, alignment, initialisation and races.

Two accesses to one place, of which one is a write, need a barrier between them: threads of different warps one of the
CTA, threads of one warp at least one of the warp. Every access is compared with all others of its epoch. So results do
not depend on the order in which warps run, and one order is enough. Bookkeeping is by granules of two bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .stamps import FLIGHT, NEVER, NONE, epoch_of, lane_of, warp_epoch_of, warp_of

if TYPE_CHECKING:
    from .machine import Machine

SHARED_BASE = 0x400  # not zero, so that an address computed without the symbol is out of bounds

_STORED, _COPIED = 1, 2  # by whom something was written: by a thread, or by its cp.async
_UNFENCED = {_STORED: "proxy fence missing", _COPIED: "proxy fence missing after cp.async"}


class SharedMemory:
    """Of all CTAs that run at once, one behind the other. Addresses are those that a thread of each CTA sees."""

    def __init__(self, size: int, ctas: int) -> None:
        self.size = size
        self.stride = -(-max(size, 16) // 1024) * 1024 + 1024  # from one CTA to the next
        total = self.stride * ctas
        granules = total // 2
        self.data = np.full(total, 0xFF, np.uint8)
        self.written = np.full(granules, NEVER, np.int64)  # stamp of the last write
        self.read = np.full(granules, NONE, np.int64)  # stamp of the last read
        self.read_by_warps = np.full(granules, -1, np.int64)  # last epoch with readers of several warps
        self.read_by_lanes = np.full(granules, -1, np.int64)  # last warp epoch with several reading lanes
        self.async_reads = np.zeros(granules, np.int32)  # outstanding reads of wgmma and tensor stores
        self.unfenced = np.zeros(granules, np.int8)  # not yet made visible to the async proxy: _STORED or _COPIED
        self.gate = np.zeros(granules, np.int32)  # the wait that shows what a tensor copy wrote, 0 for none

    def locate(self, m: Machine, addresses: np.ndarray, width: int, lanes: np.ndarray, what: str) -> np.ndarray:
        """Places in `data`."""
        at = addresses.astype(np.int64) - SHARED_BASE
        bad = (at < 0) | (at + width > self.size)
        if bad.any():
            example = f"{what} of {width} bytes at {int(at[bad][0])} of {self.size}"
            m.report_at("shared out of bounds", bad.sum(), example)
            at = np.where(bad, 0, at)
        off = at % width != 0
        if off.any():
            m.report_at("shared misaligned", off.sum(), f"{what} of {width} bytes at {int(at[off][0])}")
        return at + m.cta[lanes] * self.stride

    @staticmethod
    def granules(at: np.ndarray, width: int) -> np.ndarray:
        """[accesses, granules of each]."""
        return (at // 2)[:, None] + np.arange(max(1, width // 2))

    def load(self, m: Machine, addresses: np.ndarray, width: int, lanes: np.ndarray, what: str = "load") -> np.ndarray:
        """[lanes, width] bytes."""
        at = self.locate(m, addresses, width, lanes, what)
        self.note_read(m, self.granules(at, width), lanes)
        return self.data[at[:, None] + np.arange(width)]

    def store(self, m: Machine, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """`values` [lanes, bytes]."""
        width = values.shape[1]
        at = self.locate(m, addresses, width, lanes, "store")
        chosen = _one_writer(m, at, values)
        if chosen is not None:
            at, values, lanes = at[chosen], values[chosen], lanes[chosen]
        self.note_write(m, self.granules(at, width), lanes)
        self.data[at[:, None] + np.arange(width)] = values

    def start_copy(self, m: Machine, addresses: np.ndarray, width: int, lanes: np.ndarray) -> np.ndarray:
        """An asynchronous write begins: its bytes are poisoned until `finish_copy`. Returns their places."""
        at = self.locate(m, addresses, width, lanes, "copy")
        self.note_write(m, self.granules(at, width), lanes, flight=True)
        self.data[at[:, None] + np.arange(width)] = 0xFF
        return at

    def finish_copy(self, m: Machine, at: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """The bytes land, as if these threads wrote them now."""
        width = values.shape[1]
        self.data[at[:, None] + np.arange(width)] = values
        g = self.granules(at, width)
        self.written[g] = m.stamps(lanes)[:, None]
        self.unfenced[g] = _COPIED

    def note_read(self, m: Machine, g: np.ndarray, lanes: np.ndarray) -> None:
        """Threads read granules [lanes, n]."""
        stamp = m.stamps(lanes)[:, None]
        epoch = epoch_of(stamp)
        old = self.written[g]
        if old.max(initial=NONE) >= epoch.min(initial=NEVER):
            _check(m, old, stamp, "RAW", reads=True)
        m.barriers.check_gates(m, g, lanes)
        last = self.read[g]
        self.read[g] = stamp
        after = self.read[g]  # where several lanes read one granule now, the last of them
        self._mark_many(g, stamp, np.where(last >= epoch, last, stamp))
        if (after != stamp).any():
            self._mark_many(g, stamp, after)

    def _mark_many(self, g: np.ndarray, stamp: np.ndarray, other: np.ndarray) -> None:
        """`other` is who else read a granule in this epoch."""
        different = other != stamp
        if not different.any():
            return
        g, other, stamp = g[different], other[different], np.broadcast_to(stamp, g.shape)[different]
        warps = warp_of(other) != warp_of(stamp)
        self.read_by_warps[g[warps]] = epoch_of(stamp)[warps]
        self.read_by_lanes[g[~warps]] = warp_epoch_of(stamp)[~warps]

    def note_async_read(self, m: Machine, g: np.ndarray, lanes: np.ndarray) -> None:
        """wgmma or a tensor store reads granules [n] for these threads, whose waits and fences must allow it."""
        old = self.written[g]
        fresh, flight = old >= NEVER, (old >= FLIGHT) & (old < NEVER)
        if fresh.any():
            m.report_at("shared uninitialised read", fresh.sum(), m.thread(lanes[0]))
        if flight.any():
            m.report_at("shared read of data in flight", flight.sum(), m.thread(lanes[0]))
        m.barriers.check_gates(m, np.broadcast_to(g, (len(lanes), len(g))), lanes)
        met = (old < FLIGHT) & (old >= epoch_of(m.stamps(lanes[:1])))
        if len(lanes) == 1:  # a tensor store may read what its own thread wrote
            met &= lane_of(old) != lanes[0]
        if met.any():
            m.report_at("shared race RAW", met.sum(), "read by the async proxy without a barrier")
        for how, kind in _UNFENCED.items():
            if (missing := self.unfenced[g] == how).any():
                m.report_at(kind, missing.sum(), m.thread(lanes[0]))
        self.async_reads[g] += 1

    def end_async_read(self, m: Machine, g: np.ndarray, lanes: np.ndarray) -> None:
        """The read is over for these threads; others learn of it by a barrier."""
        self.async_reads[g] -= 1
        stamps = m.stamps(lanes)
        self.read[g] = stamps[0]
        if len(lanes) > 1:
            self.read_by_warps[g] = epoch_of(stamps[0])

    def note_write(
        self, m: Machine, g: np.ndarray, lanes: np.ndarray, *, flight: bool = False, generic: bool = True
    ) -> None:
        """Threads write granules [lanes, n]; not `generic`: by the async proxy."""
        stamp = m.stamps(lanes)[:, None]
        epoch = epoch_of(stamp)
        old = self.written[g]
        if np.where(old >= NEVER, NONE, old).max(initial=NONE) >= epoch.min(initial=NEVER):
            _check(m, old, stamp, "WAW", reads=False)
        self._check_readers(m, g, stamp)
        mark = stamp + FLIGHT if flight else stamp
        self.written[g] = mark
        if (self.written[g] != mark).any():
            m.report_at("shared race WAW", 1, "two threads write to one address at once")
        self.unfenced[g] = _STORED if generic else 0
        self.gate[g] = 0

    def _check_readers(self, m: Machine, g: np.ndarray, stamp: np.ndarray) -> None:
        epoch, last = epoch_of(stamp), self.read[g]
        if last.max(initial=NONE) >= epoch.min(initial=NEVER):
            _check(m, np.where(last == NONE, -1, last), stamp, "WAR", reads=False)
            many = self.read_by_warps[g] == epoch
            if many.any():
                m.report_at("shared race WAR", many.sum(), "read by several warps in this epoch")
            many = self.read_by_lanes[g] == warp_epoch_of(stamp)
            if many.any():
                m.report_at("shared warp race", many.sum(), "WAR: read by several lanes since the last warp barrier")
        if self.async_reads[g].any():
            m.report_at("async read overwritten", 1, m.thread(stamp.flat[0]))

    def fence(self, m: Machine, lanes: np.ndarray) -> None:
        """The async proxy sees what these threads wrote, and what came before their CTAs' last barrier."""
        where = np.flatnonzero(self.unfenced)
        if not len(where):
            return
        fencing = np.zeros(m.count, bool)
        fencing[lanes] = True
        stamps = self.written[where]
        landed = stamps < FLIGHT
        writer = np.where(landed, lane_of(stamps), 0)
        cta = m.cta[writer]
        by_cta = np.bincount(m.cta[lanes], minlength=len(m.epoch)) > 0
        before = (stamps >> 36) < m.epoch[cta]
        self.unfenced[where[landed & (fencing[writer] | (before & by_cta[cta]))]] = 0


def _check(m: Machine, old: np.ndarray, stamp: np.ndarray, kind: str, *, reads: bool) -> None:
    """`old`: stamps of accesses that this one must not meet in the same epoch."""
    stamp = np.broadcast_to(stamp, old.shape)
    fresh = old >= NEVER
    flight = (old >= FLIGHT) & ~fresh
    if fresh.any() and reads:
        m.report_at("shared uninitialised read", fresh.sum(), m.thread(stamp[fresh][0]))
    if flight.any():
        what = "shared read of data in flight" if reads else "shared write over data in flight"
        m.report_at(what, flight.sum(), f"{m.thread(stamp[flight][0])}, copied by {m.thread(old[flight][0])}")
    met = (old < FLIGHT) & (old >= epoch_of(stamp))
    if not met.any():
        return
    warps = met & (warp_of(old) != warp_of(stamp))
    if warps.any():
        example = f"{m.thread(stamp[warps][0])} and {m.thread(old[warps][0])}"
        m.report_at(f"shared race {kind}", warps.sum(), example)
    lanes = met & ~warps & (lane_of(old) != lane_of(stamp)) & (old >= warp_epoch_of(stamp))
    if lanes.any():
        example = f"{kind}: {m.thread(stamp[lanes][0])} and {m.thread(old[lanes][0])}"
        m.report_at("shared warp race", lanes.sum(), example)


def _one_writer(m: Machine, at: np.ndarray, values: np.ndarray) -> np.ndarray | None:
    """One lane for each place. Threads that hold copies of one value may write it together; None: there are none."""
    _, chosen, inverse = np.unique(at, return_index=True, return_inverse=True)
    if len(chosen) == len(at):
        return None
    equal = (values == values[chosen[inverse]]).all(1)
    if not equal.all():
        m.report_at("shared race WAW", (~equal).sum(), "two lanes write different values to one address")
    m.report_at("same value written twice", len(at) - len(chosen), "")
    return chosen
