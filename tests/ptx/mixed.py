"""Arithmetic that sm_100 adds: pairs of float32 in one register, and half precision into float32."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .matrix import halves
from .operands import Get, Mask, Step, getter, setter
from .syntax import Instruction, Operand

if TYPE_CHECKING:
    from .machine import Machine, Program

_HALF = ("bf16", "f16")


def is_mixed(i: Instruction) -> bool:
    """Whether this module executes the instruction."""
    arithmetic = i.op[0] in ("add", "sub", "mul", "fma")
    return arithmetic and (i.op[-1] == "f32x2" or (i.op[-1] in _HALF and i.op[-2] == "f32"))


def build(program: Program, i: Instruction) -> Step:
    """add, sub, mul and fma, rounded to nearest once (but for the rare double rounding of float64 to float32)."""
    assert "ftz" not in i.op, i.text
    name, kind, pairs = i.op[0], i.op[-1], i.op[-1] == "f32x2"
    put = setter(program, i.operands[0], "b64" if pairs else "f32")
    # the addend of mixed sums, which comes last, is float32
    gets = [
        _values(program, operand, "f32" if kind in _HALF and n == len(i.operands) - 2 else kind)
        for n, operand in enumerate(i.operands[1:])
    ]

    multiplies, sign = name in ("mul", "fma"), -1 if name == "sub" else 1

    def run(m: Machine, mask: Mask) -> None:
        a, b, *c = (get(m).astype(np.float64) for get in gets)
        exact = a * b + (c[0] if c else 0.0) if multiplies else a + sign * b
        result = np.ascontiguousarray(exact.astype(np.float32))
        put(m, mask, result.view(np.uint64)[:, 0] if pairs else result)

    return run


def _values(program: Program, operand: Operand, kind: str) -> Get:
    """float32: [threads, 2] of pairs, else [threads]."""
    if kind == "f32":
        one = getter(program, operand, "f32")
        return lambda m: np.broadcast_to(one(m), m.count)
    bits = getter(program, operand, "b64" if kind == "f32x2" else "b16")
    if kind == "f32x2":
        return lambda m: np.ascontiguousarray(np.broadcast_to(bits(m), m.count)).view(np.float32).reshape(-1, 2)
    return lambda m: halves(np.ascontiguousarray(np.broadcast_to(bits(m), m.count)), kind)
