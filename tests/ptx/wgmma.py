"""wgmma: products of a warp group (four warps), with factors in shared memory or registers.

The sums of a product are poisoned until its group is waited for. What it reads may not be overwritten before that.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from .matrix import cut_to_tf32, halves, left_factor
from .operands import Mask, Step, columns, getter
from .shared_memory import SHARED_BASE
from .syntax import Imm, Instruction, Reg, Vector
from .tensor_copies import swizzled

if TYPE_CHECKING:
    from .machine import Machine, Program

_POISON = 0xFFFFFFFF  # NaN


@dataclass
class _Sum:
    """A register whose value is not there yet, and the group of products of each warp group that brings it."""

    values: np.ndarray
    group: np.ndarray  # -1: it has come


class _Read(NamedTuple):
    warp_group: int
    group: int
    granules: np.ndarray


class Products:
    """All products that are not waited for."""

    def __init__(self, threads: int) -> None:
        self.sums: dict[int, _Sum] = {}  # by register
        self.commits = np.zeros(threads // 128, np.int64)
        self.reads: list[_Read] = []
        self.fenced = np.zeros(threads // 128, bool)

    def wait(self, m: Machine, warp_groups: np.ndarray, left: int) -> None:
        """All but the last `left` groups of products are done."""
        done_below = np.full(len(self.commits), -1)
        done_below[warp_groups] = self.commits[warp_groups] - left
        for register, found in list(self.sums.items()):
            done = (found.group >= 0) & (found.group < done_below)
            if done.any():
                lanes = np.flatnonzero(np.repeat(done, 128))
                m.put_lanes(register, lanes, found.values[lanes])
                found.group[done] = -1
            if (found.group < 0).all():
                del self.sums[register]
        rest = []
        for read in self.reads:
            if read.group < done_below[read.warp_group]:
                m.shared.end_async_read(m, read.granules, _one_a_warp(read.warp_group))
            else:
                rest.append(read)
        self.reads = rest

    def sum_so_far(self, m: Machine, register: int) -> np.ndarray:
        """The register's bits as the tensor cores see them: of products on their way, what they will be."""
        known, base = self.sums.get(register), m.r[register]
        if known is None:
            return np.full(m.count, _POISON, np.uint32) if base is None else base.copy()
        values = known.values.copy()
        if base is not None:
            landed = np.repeat(known.group < 0, 128)
            values[landed] = base[landed]
        return values

    def put(self, m: Machine, register: int, lanes: np.ndarray, warp_groups: np.ndarray, bits: np.ndarray) -> None:
        """A new sum in flight."""
        if register not in self.sums:
            self.sums[register] = _Sum(np.zeros(m.count, np.uint32), np.full(len(self.commits), -1))
        self.sums[register].values[lanes] = bits
        self.sums[register].group[warp_groups] = self.commits[warp_groups]
        m.put_lanes(register, lanes, np.full(len(lanes), _POISON, np.uint32))


def _one_a_warp(warp_group: int) -> np.ndarray:
    return np.arange(128 * warp_group, 128 * warp_group + 128, 32)


def _warp_groups(m: Machine, mask: Mask) -> np.ndarray:
    groups, counts = np.unique(m.active(mask) // 128, return_counts=True)
    if (counts != 128).any():
        m.report_at("divergent warp instruction", 1, "")
    return groups


def build(program: Program, i: Instruction) -> Step:
    """wgmma.fence, .commit_group, .wait_group and .mma_async"""
    what = i.op[1]
    if what == "mma_async":
        return _Product(program, i).run
    left = i.number(0) if what == "wait_group" else 0
    assert what in ("fence", "commit_group", "wait_group"), i.text

    def run(m: Machine, mask: Mask) -> None:
        groups = _warp_groups(m, mask)
        if what == "wait_group":
            m.products.wait(m, groups, left)
        else:
            m.products.fenced[groups] = what == "fence"
            m.products.commits[groups] += what == "commit_group"

    return run


@functools.lru_cache(maxsize=1024)
def _places(descriptor: int, rows: int, across: int, size: int, *, turned: bool) -> np.ndarray:
    """Addresses of a matrix [rows, 32 bytes of sums] in shared memory.

    A descriptor has fields in units of 16 bytes: start, leading offset (bit 16), stride offset (bit 32); its swizzle is
    at bit 62. `turned`: rows (M or N) follow one another in memory, not the summed dimension.
    """
    start, leading, stride = ((descriptor >> s & 0x3FFF) << 4 for s in (0, 16, 32))
    span = {0: 0, 1: 128, 2: 64, 3: 32}[descriptor >> 62]
    assert descriptor >> 49 & 7 == 0, "base offset"
    r, k = np.arange(rows)[:, None], np.arange(across)[None, :]
    if not turned:
        at = k * size
        if span:
            offset = (r // 8) * stride + (r % 8) * span + at
        else:
            offset = (r // 8) * stride + (at // 16) * leading + (r % 8) * 16 + at % 16
    else:
        assert size == 2, "turned factors have 16 bits"
        if span:
            wide = span // 2
            offset = (r // wide) * leading + (k // 8) * stride + (k % 8) * span + (r % wide) * 2
        else:
            offset = (r // 8) * stride + (k // 8) * leading + (k % 8) * 16 + (r % 8) * 2
    return swizzled(start + offset, span)


class _Product:
    """wgmma.mma_async: D[64, n] (+)= A[64, 32 bytes] B, where A is in shared memory or in registers."""

    def __init__(self, program: Program, i: Instruction) -> None:
        shape, self.kind = i.op[4], i.op[-1]
        assert i.op[5] == "f32" and i.op[6] == self.kind and self.kind in ("bf16", "f16", "tf32"), i.text
        self.n = int(shape[shape.index("n") + 1 : shape.index("k")])
        self.size = 4 if self.kind == "tf32" else 2
        d, a, b, scale, *more = i.operands
        registers = d.parts if isinstance(d, Vector) else ()
        assert len(registers) == self.n // 2, i.text
        self.sums = [program.register[r.name] for r in registers if isinstance(r, Reg)]
        flags = [part.value for part in more if isinstance(part, Imm)]
        assert flags[:2] == [1, 1], i.text  # nothing is negated
        turned = [bool(flag) for flag in flags[2:]]
        self.in_registers = isinstance(a, Vector)
        if self.in_registers:  # only B can be turned
            turned = [False, *turned]
        self.turned_a, self.turned_b = turned if len(turned) == 2 else (False, False)
        self.a = [getter(program, r, "b32") for r in a.parts] if isinstance(a, Vector) else [getter(program, a, "u64")]
        self.b, self.scale = getter(program, b, "u64"), getter(program, scale, "pred")

    def run(self, m: Machine, mask: Mask) -> None:
        groups = _warp_groups(m, mask)
        if not m.products.fenced[groups].all():
            m.report_at("proxy fence missing", 1, "no wgmma.fence since the last group")
        sums = np.stack([m.products.sum_so_far(m, register) for register in self.sums], 1).view(np.float32)
        a, b, scale = columns(m, self.a), self.b(m), self.scale(m)
        for group in map(int, groups):
            part = slice(128 * group, 128 * group + 128)
            y = self._from_shared(m, group, _uniform(m, b, group), self.n, turned=self.turned_b)
            if self.in_registers:
                x = left_factor(a[part].reshape(4, 8, 4, 4), self.kind).reshape(64, -1)
            else:
                x = self._from_shared(m, group, _uniform(m, a[:, 0], group), 64, turned=self.turned_a)
            # warp, half of its rows, group; block of columns, thread, pair
            z = np.matmul(x, y.T).reshape(4, 2, 8, self.n // 8, 4, 2).transpose(0, 2, 4, 3, 1, 5).reshape(128, -1)
            sums[part] = z + sums[part] if _uniform(m, scale, group) else z
        bits = sums.view(np.uint32)
        lanes = np.concatenate([np.arange(128 * group, 128 * group + 128) for group in groups])
        for number, register in enumerate(self.sums):
            m.products.put(m, register, lanes, groups, bits[lanes, number])

    def _from_shared(self, m: Machine, group: int, descriptor: Any, rows: int, *, turned: bool) -> np.ndarray:
        size, across = self.size, 32 // self.size
        at = _places(int(descriptor), rows, across, size, turned=turned) - SHARED_BASE
        if at.min() < 0 or at.max() + size > m.shared.size:
            m.report_at("shared out of bounds", 1, f"matrix at {int(at.min())} to {int(at.max())}")
            return np.full((rows, across), np.nan, np.float32)
        at = at + int(m.cta[128 * group]) * m.shared.stride
        g = (at[..., None] // 2 + np.arange(size // 2)).reshape(-1)
        m.shared.note_async_read(m, g, _one_a_warp(group))
        m.products.reads.append(_Read(group, int(m.products.commits[group]), g))
        values = np.ascontiguousarray(m.shared.data[at[..., None] + np.arange(size)])
        if self.kind == "tf32":
            return cut_to_tf32(values.view(np.uint32)[..., 0])
        return halves(values.view(np.uint16)[..., 0], self.kind)


def _uniform(m: Machine, values: Any, group: int) -> Any:
    """The one value that all threads of a warp group have."""
    part = np.broadcast_to(values, m.count)[128 * group : 128 * group + 128]
    if (part != part[0]).any():
        m.report_at("descriptor", 1, "threads of a warp group differ")
    return part[0]
