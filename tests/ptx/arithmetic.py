"""Instructions that compute registers from registers. Approximate ones (ex2, rcp, div.full) are exact here."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .operands import TYPES, Builder, Mask, Step, bf16_to_f32, getter, setter
from .parse import bits_of
from .syntax import Instruction

if TYPE_CHECKING:
    from .machine import Machine, Program

Function = Callable[..., Any]
_WIDE = {"s16": "s32", "u16": "u32", "s32": "s64", "u32": "u64"}
_BINARY: dict[str, Function] = {
    "add": np.add,
    "sub": np.subtract,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "div": np.divide,
}
_COMPARE: dict[str, Function] = {
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "eq": np.equal,
    "ne": np.not_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
_UNARY: dict[str, Function] = {
    "abs": np.abs,
    "neg": np.negative,
    "not": np.invert,
    "ex2": np.exp2,
    "sqrt": np.sqrt,
    "rcp": lambda x: np.float32(1) / x,
}


def _divide(m: Machine, a: Any, b: Any, mask: Mask) -> tuple[np.ndarray, np.ndarray]:
    """The quotient cut off toward zero, and the remainder, as 64-bit numbers."""
    wide = np.int64 if np.asarray(a).dtype.kind == "i" else np.uint64
    a, b = np.broadcast_arrays(np.asarray(a).astype(wide), np.asarray(b).astype(wide))
    zero = b == 0
    if zero.any() and (zero if mask is None else zero & mask).any():
        m.report_at("division by zero", 1, "")
    b = np.where(zero, wide(1), b)
    if wide is np.uint64:
        return a // b, a % b
    quotient = np.abs(a) // np.abs(b) * np.sign(a) * np.sign(b)
    return quotient, a - quotient * b


def binary(program: Program, i: Instruction) -> Step:
    """Two operands of one type."""
    name, kind = i.op[0], i.op[-1]
    assert kind != "bf16" and not kind.endswith("x2") and "ftz" not in i.op, i.text
    put = setter(program, i.operands[0], kind)
    a, b = (getter(program, operand, kind) for operand in i.operands[1:3])
    whole = kind[0] in "su"
    if name in ("div", "rem") and whole:
        which, dtype = ("div", "rem").index(name), TYPES[kind]
        return lambda m, mask: put(m, mask, _divide(m, a(m), b(m), mask)[which].astype(dtype))
    if name in ("max", "min"):
        keeps_nan = "NaN" in i.op or whole
        functions = (np.maximum, np.minimum) if keeps_nan else (np.fmax, np.fmin)
        function: Function = functions[("max", "min").index(name)]
    else:
        function = _BINARY[name]
    return lambda m, mask: put(m, mask, function(a(m), b(m)))


def shift(program: Program, i: Instruction) -> Step:
    """shl and shr: amounts past the width leave zeros, or copies of the sign."""
    kind, left = i.op[-1], i.op[0] == "shl"
    put, a = setter(program, i.operands[0], kind), getter(program, i.operands[1], kind)
    by, bits = getter(program, i.operands[2], "u32"), bits_of(kind)

    def run(m: Machine, mask: Mask) -> None:
        value, amount = np.asarray(a(m)), np.asarray(by(m)).astype(np.uint64)
        inside = np.minimum(amount, np.uint64(bits - 1)).astype(value.dtype)
        moved = value << inside if left else value >> inside
        if left or value.dtype.kind != "i":
            moved = np.where(amount >= bits, value.dtype.type(0), moved)
        put(m, mask, moved)

    return run


def multiply(program: Program, i: Instruction) -> Step:
    """mul and mad of whole numbers, with .lo, .hi or .wide; mul of floats."""
    name, kind = i.op[0], i.op[-1]
    a, b = (getter(program, operand, kind) for operand in i.operands[1:3])
    if kind in ("f32", "f64"):
        assert name == "mul" and "ftz" not in i.op, i.text
        put = setter(program, i.operands[0], kind)
        return lambda m, mask: put(m, mask, a(m) * b(m))
    part = i.op[1]
    assert part in ("lo", "hi", "wide"), i.text
    result = _WIDE[kind] if part == "wide" else kind
    put, dtype = setter(program, i.operands[0], result), TYPES[result]
    c = getter(program, i.operands[3], result) if name == "mad" else None
    bits = bits_of(kind)
    assert part != "hi" or bits <= 32, i.text
    wide = np.int64 if kind[0] == "s" else np.uint64

    def product(m: Machine) -> Any:
        x, y = np.asarray(a(m)), np.asarray(b(m))
        if part == "lo":
            return x * y
        if part == "wide":
            return x.astype(dtype) * y.astype(dtype)
        return ((x.astype(wide) * y.astype(wide)) >> wide(bits)).astype(dtype)

    if c is None:
        return lambda m, mask: put(m, mask, product(m))
    return lambda m, mask: put(m, mask, product(m) + c(m))


def fma(program: Program, i: Instruction) -> Step:
    """One rounding, but for the rare double rounding of float64 to float32."""
    assert i.op[-1] == "f32" and "ftz" not in i.op, i.text
    put = setter(program, i.operands[0], "f32")
    a, b, c = (getter(program, operand, "f32") for operand in i.operands[1:4])

    def run(m: Machine, mask: Mask) -> None:
        exact = np.asarray(a(m)).astype(np.float64) * b(m) + c(m)
        put(m, mask, exact.astype(np.float32))

    return run


def unary(program: Program, i: Instruction) -> Step:
    """One operand."""
    name, kind = i.op[0], i.op[-1]
    put, a = setter(program, i.operands[0], kind), getter(program, i.operands[1], kind)
    if kind in ("bf16", "bf16x2", "f16x2"):
        sign = np.uint16(0x8000) if kind == "bf16" else np.uint32(0x80008000)
        function: Function = {"neg": lambda x: x ^ sign, "abs": lambda x: x & ~sign}[name]
    else:
        function = _UNARY[name]
    return lambda m, mask: put(m, mask, function(a(m)))


def compare(program: Program, i: Instruction) -> Step:
    """setp. Of floats, "neu" and its like also hold for NaN."""
    kind, how = i.op[-1], i.op[1]
    assert len(i.op) == 3, i.text
    if kind in ("bf16x2", "f16x2"):
        return _compare_pairs(program, i)
    put = setter(program, i.operands[0], "pred")
    a, b = (getter(program, operand, kind) for operand in i.operands[1:3])
    if kind not in ("f32", "f64", "f16", "bf16"):
        return lambda m, mask: put(m, mask, _COMPARE[how](a(m), b(m)))
    convert = bf16_to_f32 if kind == "bf16" else np.asarray

    def run(m: Machine, mask: Mask) -> None:
        x, y = convert(a(m)), convert(b(m))
        unordered = np.isnan(x) | np.isnan(y)
        if how in ("nan", "num"):
            put(m, mask, unordered if how == "nan" else ~unordered)
        elif how == "ne":
            put(m, mask, (x != y) & ~unordered)
        elif how in _COMPARE:
            put(m, mask, _COMPARE[how](x, y))
        else:
            put(m, mask, _COMPARE[how[:-1]](x, y) | unordered)

    return run


def _compare_pairs(program: Program, i: Instruction) -> Step:
    puts = [setter(program, part, "pred") for part in i.parts(0)]
    a, b = (getter(program, operand, "b32") for operand in i.operands[1:3])
    assert i.op[1] != "ne", i.text
    function, half = _COMPARE[i.op[1]], i.op[-1] == "f16x2"

    def value(bits: Any, right: int) -> np.ndarray:
        part = ((np.asarray(bits) >> np.uint32(right)) & np.uint32(0xFFFF)).astype(np.uint16)
        return part.view(np.float16) if half else bf16_to_f32(part)

    def run(m: Machine, mask: Mask) -> None:
        x, y = a(m), b(m)
        for put, right in zip(puts, (0, 16), strict=True):
            put(m, mask, np.broadcast_to(function(value(x, right), value(y, right)), m.count))

    return run


def select(program: Program, i: Instruction) -> Step:
    """selp"""
    kind = i.op[-1]
    put = setter(program, i.operands[0], kind)
    a, b = (getter(program, operand, kind) for operand in i.operands[1:3])
    p = getter(program, i.operands[3], "pred")
    return lambda m, mask: put(m, mask, np.where(p(m), a(m), b(m)))


def extract(program: Program, i: Instruction) -> Step:
    """bfe of 32 bits: a field of bits, extended by its sign where the type is signed."""
    kind = i.op[-1]
    assert bits_of(kind) == 32, i.text
    put, a = setter(program, i.operands[0], kind), getter(program, i.operands[1], kind)
    start, length = (getter(program, operand, "u32") for operand in i.operands[2:4])

    def run(m: Machine, mask: Mask) -> None:
        at, many = (np.asarray(get(m)).astype(np.int64) & 0xFF for get in (start, length))
        assert (at + many <= 32).all(), i.text
        part = ((np.asarray(a(m)).astype(np.int64) & 0xFFFFFFFF) >> at) & ((1 << many) - 1)
        if kind[0] == "s":
            sign = (part >> np.maximum(many - 1, 0)) & 1
            part = np.where(many > 0, part - (sign << many), 0)
        put(m, mask, (part & 0xFFFFFFFF).astype(np.uint32).view(TYPES[kind]))

    return run


def permute(program: Program, i: Instruction) -> Step:
    """prmt: each byte is one of the eight of b and a, or eight copies of its sign."""
    assert i.op == ("prmt", "b32"), i.text
    put = setter(program, i.operands[0], "b32")
    a, b, c = (getter(program, operand, "b32") for operand in i.operands[1:4])

    def run(m: Machine, mask: Mask) -> None:
        both = (np.asarray(b(m)).astype(np.uint64) << np.uint64(32)) | np.asarray(a(m)).astype(np.uint64)
        chosen, result = np.asarray(c(m)).astype(np.uint64), np.uint64(0)
        for n in range(4):
            nibble = (chosen >> np.uint64(4 * n)) & np.uint64(15)
            byte = (both >> (np.uint64(8) * (nibble & np.uint64(7)))) & np.uint64(0xFF)
            byte = np.where(nibble & np.uint64(8), (byte >> np.uint64(7)) * np.uint64(0xFF), byte)
            result = result | (byte << np.uint64(8 * n))
        put(m, mask, np.asarray(result).astype(np.uint32))

    return run


BUILDERS: dict[str, Builder] = {
    **dict.fromkeys(("add", "sub", "and", "or", "xor", "div", "rem", "max", "min"), binary),
    **dict.fromkeys(("shl", "shr"), shift),
    **dict.fromkeys(("mul", "mad"), multiply),
    **dict.fromkeys(("abs", "neg", "not", "ex2", "sqrt", "rcp"), unary),
    "fma": fma,
    "setp": compare,
    "selp": select,
    "bfe": extract,
    "prmt": permute,
}
