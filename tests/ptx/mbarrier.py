"""mbarriers: counters in shared memory that threads wait at, and that tensor copies complete.

Tensor copies land as late as possible: when nobody can go on without them. Only threads that waited for their barrier
may read what they wrote (`gates`); the others need a barrier of the CTA after one that did.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .operands import Mask, Step, address_of, getter
from .syntax import Instruction

if TYPE_CHECKING:
    from .machine import Machine, Program

Key = tuple[int, int]  # CTA, address


@dataclass
class _Barrier:
    count: int  # arrivals that end a phase
    missing: int
    seen: np.ndarray  # epoch in which each thread last saw the end of a phase, -1: never
    bytes: int = 0  # still to come
    phase: int = 0


class Load(NamedTuple):
    """A tensor copy on its way to shared memory."""

    key: Key
    places: np.ndarray
    values: np.ndarray
    lane: int


class _Wait(NamedTuple):
    """A thread that stands at a barrier until the phase of this parity is over, and its register for the answer."""

    key: Key
    parity: int
    register: int


@dataclass
class _Gate:
    passed: np.ndarray  # threads that have waited
    first: int = 1 << 40  # epoch when the first of them did


class Barriers:
    """All mbarriers, who waits there, and the copies that complete them."""

    def __init__(self) -> None:
        self.barriers: dict[Key, _Barrier] = {}
        self.loads: list[Load] = []
        self.waits: dict[int, _Wait] = {}
        self.gates: list[_Gate] = [_Gate(np.empty(0, bool))]  # number 0 stands for none
        self.gate_of: dict[tuple[Key, int], int] = {}  # of a barrier's phase

    def expect(self, m: Machine, key: Key, lane: int, size: int) -> None:
        """mbarrier.arrive.expect_tx

        A thread of another warp that is still to see the end of the last phase might miss it, as only the parity of
        phases is known. So a barrier of the CTA must come between its wait and this.
        """
        barrier = self.barriers.get(key)
        if barrier is not None:
            late = (barrier.seen >= m.epoch[m.cta[lane]]) & (m.lane // 32 != lane // 32)
            if late.any():
                m.report_at("barrier", late.sum(), f"the next phase of {key} begins before all have seen the last end")
        self.arrive(m, key, 0, size)
        self.arrive(m, key, 1, 0)

    def arrive(self, m: Machine, key: Key, arrivals: int, size: int) -> None:
        """Threads arrive, or `size` bytes more are expected; negative: have come."""
        barrier = self.barriers.get(key)
        if barrier is None:
            m.report_at("barrier", 1, f"arrival at {key}, which is no barrier")
            return
        barrier.missing -= arrivals
        barrier.bytes += size
        if barrier.missing == 0 and barrier.bytes == 0:
            barrier.phase += 1
            barrier.missing = barrier.count
        elif barrier.missing < 0:
            m.report_at("barrier", 1, f"more arrivals than expected at {key}")

    def make(self, m: Machine, key: Key, count: int) -> None:
        """mbarrier.init"""
        self.barriers[key] = _Barrier(count, count, np.full(m.count, -1))

    def end(self, key: Key) -> None:
        """mbarrier.inval"""
        self.barriers.pop(key, None)
        for known in [known for known in self.gate_of if known[0] == key]:
            del self.gate_of[known]

    def wait(self, m: Machine, instruction: Instruction, mask: Mask) -> None:
        """mbarrier.try_wait: threads whose phase is not over stop here."""
        register = m.program.register[instruction.register(0).name]
        addresses = address_of(m.program, instruction.address(1))(m)
        parity = np.broadcast_to(getter(m.program, instruction.operands[2], "u32")(m), m.count)
        lanes = m.active(mask)
        _touch(m, addresses, lanes)
        for lane in map(int, lanes):
            key = key_of(m, lane, addresses[lane])
            if key not in self.barriers:
                m.report_at("barrier", 1, f"wait at {key}, which is no barrier")
                continue
            self.waits[lane] = _Wait(key, int(parity[lane]), register)
        m.stop_at_mbarrier(lanes[np.isin(lanes, list(self.waits))])
        self._let_go(m)

    def _let_go(self, m: Machine) -> bool:
        free: dict[tuple[Key, int], list[int]] = {}
        for lane, (key, parity, register) in self.waits.items():
            if self.barriers[key].phase & 1 != parity:
                free.setdefault((key, register), []).append(lane)
        for (key, register), found in free.items():
            lanes = np.array(found)
            self._observe(m, lanes, key)
            m.put_lanes(register, lanes, np.ones(len(lanes), bool))
            m.go_on(lanes)
            for lane in found:
                del self.waits[lane]
        return bool(free)

    def _observe(self, m: Machine, lanes: np.ndarray, key: Key) -> None:
        """These threads have seen the ends of all phases so far."""
        barrier, epochs = self.barriers[key], m.epoch[m.cta[lanes]]
        barrier.seen[lanes] = epochs
        for phase in range(barrier.phase):
            number = self.gate_of.get((key, phase))
            if number is not None:
                gate = self.gates[number]
                gate.passed[lanes] = True
                gate.first = min(gate.first, int(epochs.min()))

    def deliver(self, m: Machine) -> bool:
        """Nobody can go on: the copies that somebody waits for land."""
        wanted = {wait.key for wait in self.waits.values()}
        landing = [load for load in self.loads if load.key in wanted]
        self.loads = [load for load in self.loads if load.key not in wanted]
        for key, places, values, lane in landing:
            m.shared.data[places.reshape(-1)] = values
            g = places[:, ::2].reshape(-1) // 2
            phase = self.barriers[key].phase
            if (key, phase) not in self.gate_of:
                self.gate_of[key, phase] = len(self.gates)
                self.gates.append(_Gate(np.zeros(m.count, bool)))
            m.shared.written[g] = lane  # long ago, but behind a gate
            m.shared.gate[g] = self.gate_of[key, phase]
            m.shared.unfenced[g] = 0
            self.arrive(m, key, 0, -places.size)
        return self._let_go(m) or bool(landing)

    def check_gates(self, m: Machine, g: np.ndarray, lanes: np.ndarray) -> None:
        """Threads read granules [lanes, n]."""
        if len(self.gates) == 1 or not g.size:
            return
        gates = m.shared.gate[g]
        for number in range(max(1, gates.min()), gates.max() + 1):
            where = (gates == number).any(1)
            if not where.any():
                continue
            gate, who = self.gates[number], lanes[where]
            bad = ~gate.passed[who] & (m.epoch[m.cta[who]] <= gate.first)
            if bad.any():
                m.report_at("shared read of data in flight", bad.sum(), "the thread did not wait for the tensor copy")


def key_of(m: Machine, lane: int, address: int) -> Key:
    return int(m.cta[lane]), int(address)


def _touch(m: Machine, addresses: np.ndarray, lanes: np.ndarray, *, change: bool = False) -> None:
    """An mbarrier is memory: other threads may use it only a barrier after it is made, and end it only after that."""
    if not len(lanes):
        return
    g = m.shared.granules(m.shared.locate(m, addresses[lanes], 8, lanes, "mbarrier"), 8)
    if change:
        m.shared.note_write(m, g, lanes, generic=False)
    else:
        m.shared.note_read(m, g, lanes)


def build(program: Program, i: Instruction) -> Step:
    """mbarrier.init, .inval and .arrive.expect_tx; try_wait is the machine's."""
    what = i.op[1]
    assert what in ("init", "inval") or i.op[1:3] == ("arrive", "expect_tx"), i.text
    at = address_of(program, i.address(1 if what == "arrive" else 0))
    number = getter(program, i.operands[-1], "u32") if what != "inval" else lambda m: np.array(0)

    def run(m: Machine, mask: Mask) -> None:
        addresses, lanes = at(m), m.active(mask)
        numbers = np.broadcast_to(number(m), m.count)
        _touch(m, addresses, lanes, change=what != "arrive")
        for lane in lanes:
            key = key_of(m, lane, addresses[lane])
            if what == "init":
                m.barriers.make(m, key, int(numbers[lane]))
            elif what == "inval":
                m.barriers.end(key)
            else:
                m.barriers.expect(m, key, lane, int(numbers[lane]))

    return run


def fence(program: Program, i: Instruction) -> Step:
    """fence.proxy.async, and fences that change nothing where all happens in order."""
    if "proxy" not in i.op:
        return lambda m, mask: None
    assert i.op[1:3] == ("proxy", "async"), i.text
    return lambda m, mask: m.shared.fence(m, m.active(mask))
