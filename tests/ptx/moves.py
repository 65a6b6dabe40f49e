"""Instructions that move and convert values: mov, cvt, shfl, elect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .operands import TYPES, Builder, Mask, Step, bf16_to_f32, columns, f32_to_bf16, getter, setter
from .parse import bits_of
from .syntax import Instruction, Reg, Symbol, Vector

if TYPE_CHECKING:
    from .machine import Machine, Program


def move(program: Program, i: Instruction) -> Step:
    """mov, with packing and unpacking; cvta is one too. A parameter's number stands for its address."""
    kind = i.op[-1]
    target, source = i.operands
    if isinstance(target, Vector):
        return _unpack(program, i)
    put = setter(program, target, kind)
    if isinstance(source, Vector):
        return _pack(program, i)
    if isinstance(source, Symbol) and source.name in program.kernel.parameters:
        number, dtype = 1 + list(program.kernel.parameters).index(source.name), TYPES[kind]
        return lambda m, mask: put(m, mask, np.full(m.count, number, dtype))
    a = getter(program, source, kind)
    return lambda m, mask: put(m, mask, np.asarray(a(m)))


def _unpack(program: Program, i: Instruction) -> Step:
    kind, parts = i.op[-1], i.parts(0)
    small = f"b{bits_of(kind) // len(parts)}"
    puts = [None if isinstance(p, Symbol) and p.name == "_" else setter(program, p, small) for p in parts]
    a, dtype = getter(program, i.operands[1], kind), np.dtype(TYPES[small])

    def run(m: Machine, mask: Mask) -> None:
        pieces = np.ascontiguousarray(np.broadcast_to(a(m), m.count)).view(dtype).reshape(-1, len(parts))
        for n, put in enumerate(puts):
            if put is not None:
                put(m, mask, pieces[:, n].copy())

    return run


def _pack(program: Program, i: Instruction) -> Step:
    kind, parts = i.op[-1], i.parts(1)
    put = setter(program, i.operands[0], kind)
    gets = [getter(program, p, f"b{bits_of(kind) // len(parts)}") for p in parts]

    def run(m: Machine, mask: Mask) -> None:
        put(m, mask, np.ascontiguousarray(columns(m, gets)).view(TYPES[kind])[:, 0])

    return run


def _to_half(x: np.ndarray, kind: str) -> np.ndarray:
    """The bits of bfloat16 or float16."""
    return f32_to_bf16(x) if kind == "bf16" else x.astype(np.float16).view(np.uint16)


def convert(program: Program, i: Instruction) -> Step:
    """cvt; whole numbers are cut off at the limits of their type."""
    to, source = i.op[-2], i.op[-1]
    put = setter(program, i.operands[0], to)
    gets = [getter(program, operand, source) for operand in i.operands[1:]]
    assert set(i.op[1:-2]) <= {"rn", "rz", "rni", "rzi"} and to != "tf32", i.text

    def value(m: Machine, n: int = 0) -> np.ndarray:
        x = np.asarray(gets[n](m))
        return bf16_to_f32(x) if source == "bf16" else x

    if to in ("bf16x2", "f16x2"):

        def pack(m: Machine, mask: Mask) -> None:
            high, low = (_to_half(value(m, n), to[:-2]).astype(np.uint32) for n in (0, 1))
            put(m, mask, (high << np.uint32(16)) | low)

        return pack
    if to in ("bf16", "f16"):
        assert source == "f32" or to != "bf16", i.text
        return lambda m, mask: put(m, mask, _to_half(value(m), to).view(TYPES[to]))
    dtype = np.dtype(TYPES[to])
    if dtype.kind in "iu" and source in ("f32", "f64", "bf16", "f16"):
        rounding = np.rint if "rni" in i.op else np.trunc
        limits = np.iinfo(dtype)

        def to_whole(m: Machine, mask: Mask) -> None:
            x = rounding(np.nan_to_num(value(m).astype(np.float64), nan=0.0))
            put(m, mask, np.clip(x, limits.min, limits.max).astype(dtype))

        return to_whole
    return lambda m, mask: put(m, mask, value(m).astype(dtype))


def shuffle(program: Program, i: Instruction) -> Step:
    """shfl.sync of 32-bit registers, perhaps with a predicate that tells whether the other lane exists."""
    how, parts = i.op[2], i.parts(0)
    put, a = setter(program, parts[0], "b32"), getter(program, i.operands[1], "b32")
    put_inside = setter(program, parts[1], "pred") if len(parts) > 1 else None
    b, c = getter(program, i.operands[2], "u32"), getter(program, i.operands[3], "u32")

    def other_lane(lane: np.ndarray, many: Any, clamp: Any) -> tuple[np.ndarray, np.ndarray]:
        segment, last = (clamp >> 8) & 31, clamp & 31
        highest = (lane & segment) | (last & ~segment)
        if how == "up":
            return lane - many, lane - many >= highest
        others = {"bfly": lane ^ many, "idx": (lane & segment) | (many & ~segment), "down": lane + many}
        return others[how], others[how] <= highest

    def run(m: Machine, mask: Mask) -> None:
        m.whole_warps(mask)
        lane = m.lane % 32
        other, inside = other_lane(lane, np.asarray(b(m)).astype(np.int64) & 31, np.asarray(c(m)).astype(np.int64))
        other = np.where(inside, other, lane)
        put(m, mask, np.broadcast_to(a(m), m.count)[m.lane - lane + other])
        if put_inside is not None:
            put_inside(m, mask, np.broadcast_to(inside, m.count))

    return run


def elect(program: Program, i: Instruction) -> Step:
    """elect.sync: which thread is not said. So it is the last one, which is never thread 0 of a block."""
    chosen_register = i.parts(0)[1]
    assert isinstance(chosen_register, Reg), i.text
    put = setter(program, chosen_register, "pred")

    def run(m: Machine, mask: Mask) -> None:
        if mask is None:
            put(m, mask, m.tid % 32 == 31)
            return
        parts = mask.reshape(-1, 32)
        chosen = np.zeros_like(parts)
        chosen[np.arange(len(parts)), 31 - parts[:, ::-1].argmax(1)] = True
        put(m, mask, chosen.reshape(-1) & mask)

    return run


BUILDERS: dict[str, Builder] = {"mov": move, "cvta": move, "cvt": convert, "shfl": shuffle, "elect": elect}
