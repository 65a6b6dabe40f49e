"""Runs a parsed kernel: all threads of several CTAs at once, each register one array over them.

Threads that took different branches are kept apart by masks. The group with the lowest instruction runs first, which
brings them together again. Anything asynchronous is completed as late as its waits allow.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .access import ThreadCopies
from .decode import decode
from .global_memory import GlobalMemory
from .mbarrier import Barriers
from .operands import Mask, Step
from .report import Report
from .shared_memory import SharedMemory
from .stamps import EPOCH, WARP_EPOCH, lane_of
from .syntax import Imm, Instruction, Kernel, Symbol
from .tensor_copies import TensorMap, TensorStores
from .wgmma import Products

_READY, _AT_BARRIER, _AT_MBARRIER, _EXITED = range(4)
_GARBAGE = 0xDEADBEEFDEADBEEF  # what a register holds in threads that never wrote it
_THREADS = 4096  # that run at once
_STEPS = 2_000_000


class Stuck(RuntimeError):
    """No thread can go on, or they go on for ever."""


class Program:
    """A kernel with its instructions decoded."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.register = {name: i for i, name in enumerate(kernel.widths)}
        self.leaders = set(kernel.labels.values())  # where groups of threads may meet again
        self.steps: list[Step | None] = [decode(self, instruction) for instruction in kernel.instructions]
        self.guards = [None if i.predicate is None else self.register[i.predicate.name] for i in kernel.instructions]


def execute(
    program: Program,
    memory: GlobalMemory,
    grid: Sequence[int],
    arguments: Sequence[bytes],
    shared: int,
    report: Report,
    *,
    tensor_maps: Mapping[int, TensorMap] | None = None,
) -> int:
    """Run a whole grid with `shared` bytes a CTA. Returns the number of instructions, each counted for all threads.

    `arguments` are the bytes of each parameter; `tensor_maps` describe those that are maps, by their number from 1.
    """
    machine = Machine(program, memory, grid, arguments, shared, report, tensor_maps or {})
    with np.errstate(all="ignore"):
        machine.run()
    return machine.executed


class Machine:
    """The state of all threads of the CTAs that run now."""

    def __init__(
        self,
        program: Program,
        memory: GlobalMemory,
        grid: Sequence[int],
        arguments: Sequence[bytes],
        shared: int,
        report: Report,
        tensor_maps: Mapping[int, TensorMap],
    ) -> None:
        self.program, self.kernel, self.memory, self.report = program, program.kernel, memory, report
        self.tensor_maps, self.shared_size = tensor_maps, shared
        self.grid = (*grid, 1, 1)[:3]
        self.parameters = dict(zip(self.kernel.parameters, arguments, strict=True))
        self.executed = 0
        ctas = [(x, y, z) for z, y, x in itertools.product(*map(range, reversed(self.grid)))]
        assert len(ctas) * self.kernel.threads < WARP_EPOCH, "too many threads for a stamp"
        at_once = max(1, _THREADS // self.kernel.threads)
        self.batches = [(first, ctas[first : first + at_once]) for first in range(0, len(ctas), at_once)]

    def run(self) -> None:
        """All CTAs, a few at once."""
        for first, ctas in self.batches:
            self._start(first, ctas)
            self._loop()

    def _start(self, first: int, ctas: Sequence[tuple[int, int, int]]) -> None:
        threads = self.kernel.threads
        self.first_cta, self.count = first, len(ctas) * threads
        self.lane = np.arange(self.count)
        self.cta = self.lane // threads
        self.tid = (self.lane % threads).astype(np.uint32)
        self.ctaid = [np.array([cta[axis] for cta in ctas], np.uint32)[self.cta] for axis in range(3)]
        self.r: list[np.ndarray | None] = [None] * len(self.program.register)
        self.pc = np.zeros(self.count, np.int64)
        self.state = np.zeros(self.count, np.int8)
        self.barrier = np.zeros(self.count, np.int64)  # its number, and how many threads it waits for
        self.expected = np.zeros(self.count, np.int64)
        self.epoch = np.ones(len(ctas), np.int64)
        self.warp_epoch = np.zeros(self.count // 32, np.int64)
        self.shared = SharedMemory(self.shared_size, len(ctas))
        self.thread_copies = ThreadCopies(self.count)
        self.barriers = Barriers()
        self.tensor_stores = TensorStores(self.count)
        self.products = Products(self.count)
        self._restamp()

    def _restamp(self) -> None:
        warp_epoch = self.warp_epoch[self.lane // 32] % (EPOCH // WARP_EPOCH)
        self._stamps = self.epoch[self.cta] * EPOCH + warp_epoch * WARP_EPOCH + self.lane

    def stamps(self, lanes: np.ndarray) -> np.ndarray:
        """Of these threads now, for shared memory."""
        return self._stamps[lanes]

    def global_stamps(self, lanes: np.ndarray) -> np.ndarray:
        """The same with threads counted through the whole grid."""
        return self._stamps[lanes] + self.first_cta * self.kernel.threads

    def cta_of(self, lanes: np.ndarray) -> np.ndarray:
        """The CTAs of threads that are counted through the grid."""
        return lanes // self.kernel.threads

    def thread(self, stamp: Any) -> str:
        """Who made a stamp, in words."""
        lane = int(lane_of(int(stamp)))
        return f"CTA {self.first_cta + lane // self.kernel.threads} thread {lane % self.kernel.threads}"

    def report_at(self, kind: str, count: int, example: str) -> None:
        """Report something of the instruction that is being executed."""
        self.report.add(kind, self.current.line, self.current.text, count, example)

    def active(self, mask: Mask) -> np.ndarray:
        """The threads that execute."""
        return self.lane if mask is None else np.flatnonzero(mask)

    def put(self, index: int, value: np.ndarray, mask: Mask) -> None:
        """Set a register to raw bits of its own width."""
        if mask is not None:
            value = np.where(mask, value, self._old(index, value.dtype))
        elif value.ndim == 0:
            value = np.full(self.count, value)
        self.r[index] = value

    def put_lanes(self, index: int, lanes: np.ndarray, value: np.ndarray) -> None:
        """The same for some threads only, `value` one for each."""
        if len(lanes) < self.count:
            new = np.broadcast_to(self._old(index, value.dtype), self.count).copy()
            new[lanes] = value
            value = new
        self.r[index] = value

    def _old(self, index: int, dtype: np.dtype) -> np.ndarray:
        old = self.r[index]
        return np.array(_GARBAGE, np.uint64).astype(dtype) if old is None else old

    def whole_warps(self, mask: Mask) -> None:
        """Instructions of a whole warp want all its threads."""
        if mask is not None:
            parts = mask.reshape(-1, 32).sum(1)
            if ((parts != 0) & (parts != 32)).any():
                self.report_at("divergent warp instruction", 1, "")

    def warp_barrier(self, mask: Mask) -> None:
        """bar.warp.sync"""
        self.warp_epoch[np.unique(self.active(mask) // 32)] += 1
        self._restamp()

    def stop_at_mbarrier(self, lanes: np.ndarray) -> None:
        """These threads wait until `go_on`."""
        self.state[lanes] = _AT_MBARRIER

    def go_on(self, lanes: np.ndarray) -> None:
        """These threads are ready again."""
        self.state[lanes] = _READY

    def _loop(self) -> None:
        while (self.state != _EXITED).any():
            ready = self.state == _READY
            if ready.any():
                pc = int(self.pc[ready].min())
                mask = ready & (self.pc == pc)
                self._run_block(pc, None if mask.all() else mask)
            elif not (self._release() or self.barriers.deliver(self)):
                raise Stuck(self.kernel.instructions[int(self.pc[self.state != _EXITED][0])].text)
        self.thread_copies.at_exit(self)
        rest = len(self.barriers.loads), len(self.tensor_stores.reading), len(self.products.reads)
        if any(rest):
            self.report_at("tensor copy in flight at exit", 1, "{} loads, {} stores, {} products".format(*rest))

    def _run_block(self, pc: int, mask: Mask) -> None:
        """Run the threads of `mask` from `pc` on, until they part or may meet others."""
        first, following = pc, pc
        while following is not None:
            pc = following
            if mask is not None and pc != first and pc in self.program.leaders:
                self.pc[mask] = pc
                return
            self.current: Instruction = self.kernel.instructions[pc]
            self.executed += 1
            if self.executed > _STEPS:
                raise Stuck("too many steps")
            here = self._guarded(pc, mask)
            step = self.program.steps[pc]
            if step is not None:
                if here is None or here.any():
                    step(self, here)
                following = pc + 1
            else:
                following = self._control(pc, mask, here)

    def _guarded(self, pc: int, mask: Mask) -> Mask:
        """Which threads of `mask` execute the instruction at `pc`."""
        guard = self.program.guards[pc]
        if guard is None:
            return mask
        flag = self.r[guard]
        assert flag is not None, f"line {self.current.line}: predicate never set"
        here = ~flag if self.current.negated else flag
        if mask is not None:
            here = here & mask
        return None if here.all() else here

    def _control(self, pc: int, mask: Mask, here: Mask) -> int | None:
        """An instruction of control flow; the next one if all threads of `mask` go on together, else None."""
        name = self.current.op[0]
        if name == "bra":
            return self._branch(pc, mask, here)
        lanes = self.active(here)
        self.pc[self.active(mask)] = pc + 1
        if name in ("ret", "exit"):
            self.state[lanes] = _EXITED
        elif name == "mbarrier":
            if len(lanes):
                self.barriers.wait(self, self.current, here)
        else:
            self._arrive(lanes)
        return pc + 1 if mask is None and (self.state == _READY).all() else None

    def _branch(self, pc: int, mask: Mask, here: Mask) -> int | None:
        label = self.current.operands[0]
        assert isinstance(label, Symbol)
        target = self.kernel.labels[label.name]
        if mask is None and here is None:
            return target
        if mask is None and here is not None and not here.any():
            return pc + 1
        self.pc[self.active(mask)] = pc + 1
        self.pc[self.active(here)] = target
        return None

    def _arrive(self, lanes: np.ndarray) -> None:
        """bar.sync and barrier.sync"""
        number, *count = (part.value for part in self.current.operands if isinstance(part, Imm))
        self.state[lanes] = _AT_BARRIER
        self.barrier[lanes] = number
        self.expected[lanes] = count[0] if count else -1
        self._release()

    def _release(self) -> bool:
        """Let go the CTAs all of whose threads have come."""
        waiting = self.state == _AT_BARRIER
        ctas = len(self.epoch)
        live = np.bincount(self.cta[self.state != _EXITED], minlength=ctas)
        came = np.bincount(self.cta[waiting], minlength=ctas)
        expected = np.where(self.expected < 0, live[self.cta], self.expected)
        free = waiting & (came[self.cta] == expected)
        if not free.any():
            return False
        freed = np.unique(self.cta[free])
        for cta in freed:
            if len(np.unique(self.barrier[free & (self.cta == cta)])) > 1:
                self.report_at("barrier", 1, "threads of a CTA at different barriers")
        self.state[free] = _READY
        self.epoch[freed] += 1
        self._restamp()
        return True
