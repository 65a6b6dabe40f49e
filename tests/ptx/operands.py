"""Reading and writing operands as numpy arrays of a PTX type."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np

from .parse import bits_of
from .shared_memory import SHARED_BASE
from .syntax import Address, Imm, Instruction, Operand, Reg, Special, Symbol

if TYPE_CHECKING:
    from .machine import Machine, Program

Mask = np.ndarray | None
"""Which threads execute; None stands for all."""
Get = Callable[["Machine"], Any]
"""An operand's values: one for each thread, or one for all."""
Put = Callable[["Machine", Mask, Any], None]
Step = Callable[["Machine", Mask], None]
Builder = Callable[["Program", Instruction], Step]

UNSIGNED = {1: np.bool_, 8: np.uint8, 16: np.uint16, 32: np.uint32, 64: np.uint64}
TYPES: dict[str, Any] = {
    "pred": np.bool_,
    **{f"{letter}{bits}": UNSIGNED[bits] for letter in "bu" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}").type for bits in (8, 16, 32, 64)},
    **{f"f{bits}": np.dtype(f"f{bits // 8}").type for bits in (16, 32, 64)},
    "bf16": np.uint16,  # by their bits
    "bf16x2": np.uint32,
    "f16x2": np.uint32,
}


def getter(program: Program, operand: Operand, kind: str) -> Get:
    """What reads the operand as values of the type `kind`."""
    dtype = np.dtype(TYPES[kind])
    if isinstance(operand, Reg):
        return _register(program, operand, kind)
    if isinstance(operand, Imm):
        value = _constant(operand, kind)
        return lambda m: value
    if isinstance(operand, Special):
        return _special(operand.name, dtype)
    assert isinstance(operand, Symbol) and operand.name in program.kernel.shared_symbols, operand
    base = np.array(SHARED_BASE, dtype)
    return lambda m: base


def _register(program: Program, operand: Reg, kind: str) -> Get:
    index, name, dtype = program.register[operand.name], operand.name, np.dtype(TYPES[kind])
    raw = UNSIGNED[8 * dtype.itemsize]
    width = program.kernel.widths[name]
    same = width == bits_of(kind)
    garbage = None if kind == "pred" else np.array(0xDEADBEEFDEADBEEF & ((1 << width) - 1), UNSIGNED[width])

    def read(m: Machine) -> np.ndarray:
        value = m.r[index]
        if value is None:  # LLVM leaves halves of pairs undefined that it does not use
            if garbage is None:
                raise RuntimeError(f"line {m.current.line}: {name} is read before it is written")
            m.report_at("register never written", 1, name)
            value = garbage
        return value.view(dtype) if same else value.astype(raw).view(dtype)  # the low bits

    return read


def _constant(operand: Imm, kind: str) -> np.ndarray:
    dtype = np.dtype(TYPES[kind])
    if kind == "pred":
        return np.array(bool(operand.value))
    raw = UNSIGNED[8 * dtype.itemsize]
    if dtype.kind == "f":
        if operand.bits and dtype.itemsize > 2:
            return np.array(operand.bits, raw).view(dtype)
        return np.array(float(operand.value), dtype)
    number = operand.bits if isinstance(operand.value, float) else operand.value
    return np.array(number & ((1 << (8 * dtype.itemsize)) - 1), raw).view(dtype)


def _special(name: str, dtype: np.dtype) -> Get:
    axis = "xyz".find(name[-1])
    if name == "%laneid":
        return lambda m: (m.tid % 32).astype(dtype)
    if name.startswith("%tid"):
        return lambda m: (m.tid if axis == 0 else np.zeros_like(m.tid)).astype(dtype)
    if name.startswith("%ctaid"):
        return lambda m: m.ctaid[axis].astype(dtype)
    if name.startswith("%nctaid"):
        return lambda m: np.array((*m.grid, 1, 1)[axis], dtype)
    if name.startswith("%ntid"):
        return lambda m: np.array(m.kernel.threads if axis == 0 else 1, dtype)
    assert name.startswith("%cluster"), name  # every cluster is one CTA
    return lambda m: np.array(0, dtype)


def setter(program: Program, operand: Operand, kind: str) -> Put:
    """What writes values of the type; narrower ones are extended as the type says."""
    assert isinstance(operand, Reg), operand
    index, width = program.register[operand.name], program.kernel.widths[operand.name]
    dtype, target = np.dtype(TYPES[kind]), np.dtype(UNSIGNED[width])
    if width == bits_of(kind):
        return lambda m, mask, value: m.put(index, np.asarray(value, dtype).view(target), mask)
    assert target.itemsize > dtype.itemsize, (operand, kind)
    signed = np.dtype(f"i{target.itemsize}") if dtype.kind == "i" else target
    raw = dtype if dtype.kind in "iu" else np.dtype(UNSIGNED[8 * dtype.itemsize])
    return lambda m, mask, value: m.put(index, np.asarray(value, dtype).view(raw).astype(signed).view(target), mask)


def address_of(program: Program, operand: Address) -> Get:
    """Byte addresses of all threads, as int64."""
    kind = f"u{program.kernel.widths[operand.base.name]}" if isinstance(operand.base, Reg) else "u64"
    get, offset = getter(program, operand.base, kind), np.int64(operand.offset)
    return lambda m: np.broadcast_to(np.asarray(get(m)).astype(np.int64) + offset, m.count)


def columns(m: Machine, gets: list[Get]) -> np.ndarray:
    """[threads, operands] of the operands' values."""
    return np.stack([np.broadcast_to(get(m), m.count) for get in gets], 1)


def bf16_to_f32(bits: np.ndarray) -> np.ndarray:
    """Exact; bfloat16 is the upper half of float32."""
    return (np.asarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def f32_to_bf16(values: np.ndarray) -> np.ndarray:
    """Rounded to nearest even; NaN becomes the canonical one."""
    bits = np.ascontiguousarray(values, np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint32(0x7FFF), rounded).astype(np.uint16)
