"""Loads and stores of threads, and their asynchronous copies to shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .operands import TYPES, Mask, Step, address_of, columns, getter, setter
from .parse import bits_of
from .syntax import Instruction, Symbol

if TYPE_CHECKING:
    from .global_memory import GlobalMemory
    from .machine import Machine, Program
    from .shared_memory import SharedMemory


def _is_shared(i: Instruction) -> bool:
    shared = any(word.startswith("shared") for word in i.op)
    assert shared or "global" in i.op, i.text
    return shared


def _space(m: Machine, shared: bool) -> GlobalMemory | SharedMemory:
    return m.shared if shared else m.memory


def load(program: Program, i: Instruction) -> Step:
    """ld of parameters, global and shared memory, also several registers at once."""
    kind = i.op[-1]
    if "param" in i.op:
        return _load_parameter(program, i)
    shared, at = _is_shared(i), address_of(program, i.address(1))
    puts = [setter(program, register, kind) for register in i.parts(0)]
    width, dtype = bits_of(kind) // 8 * len(puts), np.dtype(TYPES[kind])

    def run(m: Machine, mask: Mask) -> None:
        lanes = m.active(mask)
        raw = _space(m, shared).load(m, at(m)[lanes], width, lanes)
        values = np.ascontiguousarray(raw).view(dtype)
        for n, put in enumerate(puts):
            if mask is None:
                put(m, None, values[:, n].copy())
            else:
                whole = np.zeros(m.count, dtype)
                whole[lanes] = values[:, n]
                put(m, mask, whole)

    return run


def _load_parameter(program: Program, i: Instruction) -> Step:
    kind, source = i.op[-1], i.address(1)
    put, dtype = setter(program, i.operands[0], kind), np.dtype(TYPES[kind])
    assert isinstance(source.base, Symbol), i.text
    name, start, end = source.base.name, source.offset, source.offset + bits_of(kind) // 8

    def run(m: Machine, mask: Mask) -> None:
        value = np.frombuffer(m.parameters[name][start:end], dtype)[0]
        put(m, mask, np.full(m.count, value, dtype))

    return run


def store(program: Program, i: Instruction) -> Step:
    """st to global and shared memory, also several registers at once."""
    shared, at = _is_shared(i), address_of(program, i.address(0))
    gets = [getter(program, register, f"b{bits_of(i.op[-1])}") for register in i.parts(1)]

    def run(m: Machine, mask: Mask) -> None:
        lanes = m.active(mask)
        values = np.ascontiguousarray(columns(m, gets)[lanes]).view(np.uint8).reshape(len(lanes), -1)
        _space(m, shared).store(m, at(m)[lanes], values, lanes)

    return run


class ThreadCopies:
    """The cp.async of all threads that are on their way, by the group they belong to."""

    def __init__(self, threads: int) -> None:
        self.commits = np.zeros(threads, np.int64)
        self.flying: list[tuple[np.ndarray, ...]] = []  # places, bytes, lanes, groups

    def wait(self, m: Machine, lanes: np.ndarray, left: int) -> None:
        """All but the last `left` groups of these threads have landed."""
        done_below = np.full(m.count, -1)
        done_below[lanes] = self.commits[lanes] - left
        rest = []
        for at, values, who, group in self.flying:
            done = group < done_below[who]
            if done.any():
                m.shared.finish_copy(m, at[done], values[done], who[done])
            if not done.all():
                rest.append((at[~done], values[~done], who[~done], group[~done]))
        self.flying = rest

    def at_exit(self, m: Machine) -> None:
        """Harmless, as nobody reads them any more; but a sign of a wrong count."""
        if self.flying:
            m.report_at("copies in flight at exit", 1, "")


def copy_async(program: Program, i: Instruction) -> Step:
    """cp.async of threads, and its groups and waits."""
    if i.op[2] == "commit_group":

        def commit(m: Machine, mask: Mask) -> None:
            m.thread_copies.commits[m.active(mask)] += 1

        return commit
    if i.op[2] in ("wait_group", "wait_all"):
        left = i.number(0) if i.operands else -1
        return lambda m, mask: m.thread_copies.wait(m, m.active(mask), left)
    assert i.op[2] in ("ca", "cg"), i.text
    to, source, width = address_of(program, i.address(0)), address_of(program, i.address(1)), i.number(2)
    given = getter(program, i.operands[3], "u32") if len(i.operands) > 3 else lambda m: np.array(width, np.uint32)
    assert i.op[2] == "ca" or width == 16, i.text

    def run(m: Machine, mask: Mask) -> None:
        lanes = m.active(mask)
        size = np.broadcast_to(given(m), m.count)[lanes].astype(np.int64)
        assert ((size == 0) | (size == width)).all(), i.text
        address, full = source(m)[lanes], size == width
        values = np.zeros((len(lanes), width), np.uint8)  # a copy of nothing writes zeros
        if full.any():
            values[full] = m.memory.load(m, address[full], width, lanes[full])
        outside = m.memory.outside(address[~full], width)
        if outside.any():
            m.report_at("masked copy address out of bounds", outside.sum(), f"{int(address[~full][outside][0]):#x}")
        at = m.shared.start_copy(m, to(m)[lanes], width, lanes)
        m.thread_copies.flying.append((at, values, lanes, m.thread_copies.commits[lanes].copy()))

    return run
