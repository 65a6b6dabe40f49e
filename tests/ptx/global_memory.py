"""Global memory of one launch. Every access is checked for bounds, alignment, initialisation and races.

CTAs cannot wait for each other. So two accesses of different CTAs to one place, of which one is a write, are a race.
Inside a CTA they need a barrier between them. Bookkeeping of races is by granules of two bytes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .stamps import epoch_of, lane_of

if TYPE_CHECKING:
    from .machine import Machine

BASE = 0x7F0000000000  # where global memory begins
GUARD = 1 << 16  # bytes around each region that nobody may touch
_ALIGNED = 256
_MANY = -2  # several threads read this


@dataclass
class Region:
    """Memory that a kernel may use."""

    data: np.ndarray  # bytes
    initialised: np.ndarray | None = None  # which of them hold values; None: all
    writable: np.ndarray | bool = False
    phase: int = 0  # its address modulo 256


class GlobalMemory:
    """A copy of the regions, far from each other."""

    def __init__(self, regions: Sequence[Region]) -> None:
        self.regions, self.starts, used = regions, [], GUARD
        for region in regions:
            self.starts.append(-(-used // _ALIGNED) * _ALIGNED + region.phase)
            used = self.starts[-1] + len(region.data) + GUARD
        self.data = np.full(used, 0xFF, np.uint8)  # bytes of NaN
        self.valid = np.zeros(used, np.uint8)  # 0 outside, 1 in a region, 2 initialised
        self.writable = np.zeros(used, bool)
        self.writer = np.full(used // 2 + 1, -1, np.int64)
        self.reader = np.full(used // 2 + 1, -1, np.int64)
        for region, start in zip(regions, self.starts, strict=True):
            part = slice(start, start + len(region.data))
            known = np.ones(len(region.data), bool) if region.initialised is None else region.initialised
            self.data[part] = np.where(known, region.data, 0xFF)
            self.valid[part] = 1 + known
            self.writable[part] = region.writable

    def address(self, region: int) -> int:
        """Where a region begins."""
        return BASE + self.starts[region]

    def result(self, region: int) -> tuple[np.ndarray, np.ndarray]:
        """A region's bytes now, and which of them hold values."""
        part = slice(self.starts[region], self.starts[region] + len(self.regions[region].data))
        return self.data[part], self.valid[part] == 2

    def outside(self, addresses: np.ndarray, width: int) -> np.ndarray:
        """Which accesses are not inside one region."""
        at = addresses.astype(np.int64) - BASE
        ok = (at >= 0) & (at + width <= len(self.data))
        safe = np.where(ok, at, 0)
        return ~ok | (self.valid[safe[:, None] + np.arange(width)].min(1) == 0)

    def _locate(self, m: Machine, addresses: np.ndarray, width: int, what: str) -> tuple[np.ndarray, np.ndarray]:
        """Offsets, and which of them may be used."""
        bad = self.outside(addresses, width)
        if bad.any():
            m.report_at("global out of bounds", bad.sum(), f"{what} of {width} bytes at {int(addresses[bad][0]):#x}")
        off = (addresses.astype(np.int64) - BASE) % width != 0
        if off.any():
            m.report_at("global misaligned", off.sum(), f"{what} of {width} bytes at {int(addresses[off][0]):#x}")
        return np.where(bad, 0, addresses.astype(np.int64) - BASE), ~bad

    def load(self, m: Machine, addresses: np.ndarray, width: int, lanes: np.ndarray) -> np.ndarray:
        """[lanes, width] bytes."""
        at, ok = self._locate(m, addresses, width, "load")
        index = at[:, None] + np.arange(width)
        fresh = ok & (self.valid[index].min(1) < 2)
        if fresh.any():
            m.report_at("global uninitialised read", fresh.sum(), f"{int(addresses[fresh][0]):#x}")
        if self.writable[at[ok]].any():
            g = _granules(at, width)
            stamp = m.global_stamps(lanes)[:, None]
            _conflict(m, self.writer[g], stamp, "read of what another thread wrote")
            other = (self.reader[g] != -1) & (self.reader[g] != stamp)
            self.reader[g] = np.where(other, _MANY, stamp)
        return self.data[index]

    def store(self, m: Machine, addresses: np.ndarray, values: np.ndarray, lanes: np.ndarray) -> None:
        """`values` [lanes, bytes]."""
        width = values.shape[1]
        at, ok = self._locate(m, addresses, width, "store")
        at, values, lanes = at[ok], values[ok], lanes[ok]
        index = at[:, None] + np.arange(width)
        if not self.writable[index].all():
            m.report_at("global read-only written", 1, f"{int(at[0]) + BASE:#x}")
        g = _granules(at, width)
        stamp = m.global_stamps(lanes)[:, None]
        _conflict(m, self.writer[g], stamp, "written by two threads")
        readers = self.reader[g]
        _conflict(m, np.where(readers == _MANY, -1, readers), stamp, "written after another thread's read")
        self.data[index] = values
        self.valid[index] = 2
        self.writer[g] = stamp
        if (self.writer[g] != stamp).any():
            m.report_at("global race", 1, "two threads store to one address at once")


def _granules(at: np.ndarray, width: int) -> np.ndarray:
    return (at // 2)[:, None] + np.arange(max(1, width // 2))


def _conflict(m: Machine, old: np.ndarray, stamp: np.ndarray, what: str) -> None:
    found = (old >= 0) & (lane_of(old) != lane_of(stamp))  # another thread
    same_cta = m.cta_of(lane_of(old)) == m.cta_of(lane_of(stamp))
    found &= ~(same_cta & (old < epoch_of(stamp)))  # a barrier between
    if found.any():
        m.report_at("global race", found.sum(), what)
