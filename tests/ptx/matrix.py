"""Matrices that are spread over the threads of a warp: ldmatrix, stmatrix and mma.sync."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from .operands import Mask, Step, address_of, bf16_to_f32, columns, getter, setter
from .syntax import Instruction

if TYPE_CHECKING:
    from .machine import Machine, Program


def _matrices(i: Instruction) -> tuple[int, bool]:
    """How many, and whether transposed."""
    assert "m8n8" in i.op and i.op[-1] == "b16", i.text
    return int(next(word for word in i.op if word in ("x1", "x2", "x4"))[1:]), "trans" in i.op


def load_matrix(program: Program, i: Instruction) -> Step:
    """8x8 values of 16 bits: row r of matrix q is at the address of lane 8 q + r."""
    count, transposed = _matrices(i)
    puts = [setter(program, register, "b32") for register in i.parts(0)]
    assert len(puts) == count, i.text
    at = address_of(program, i.address(1))

    def run(m: Machine, mask: Mask) -> None:
        m.whole_warps(mask)
        lanes = m.active(mask)
        who = lanes.reshape(-1, 32)[:, : 8 * count].reshape(-1)
        rows = m.shared.load(m, at(m)[who], 16, who, "ldmatrix")
        matrices = np.ascontiguousarray(rows).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        pairs = np.ascontiguousarray(matrices).view(np.uint32).reshape(-1, count, 32)
        for n, put in enumerate(puts):
            value = np.zeros(m.count, np.uint32)
            value[lanes] = pairs[:, n].reshape(-1)
            put(m, mask, value)

    return run


def store_matrix(program: Program, i: Instruction) -> Step:
    """The reverse of ldmatrix."""
    count, transposed = _matrices(i)
    at = address_of(program, i.address(0))
    gets = [getter(program, register, "b32") for register in i.parts(1)]

    def run(m: Machine, mask: Mask) -> None:
        m.whole_warps(mask)
        lanes = m.active(mask)
        values = columns(m, gets)[lanes].reshape(-1, 32, count).transpose(0, 2, 1)
        matrices = np.ascontiguousarray(values).view(np.uint16).reshape(-1, count, 8, 8)
        if transposed:
            matrices = matrices.transpose(0, 1, 3, 2)
        rows = np.ascontiguousarray(matrices).reshape(-1, 8).view(np.uint8)
        who = lanes.reshape(-1, 32)[:, : 8 * count].reshape(-1)
        m.shared.store(m, at(m)[who], rows, who)

    return run


def halves(bits: np.ndarray, kind: str) -> np.ndarray:
    """uint16 to float32."""
    return bf16_to_f32(bits) if kind == "bf16" else bits.view(np.float16).astype(np.float32)


def cut_to_tf32(bits: np.ndarray) -> np.ndarray:
    """float32 without the 13 bits that the units do not look at."""
    return (bits & np.uint32(0xFFFFE000)).view(np.float32)


def left_factor(registers: np.ndarray, kind: str) -> np.ndarray:
    """A [warps, 16, 16, or 8 for tf32] from the registers [warps, 8 groups, 4 threads, 4].

    The four registers are: rows of the upper and the lower half (fast), columns of the left and the right half.
    """
    warps = len(registers)
    if kind == "tf32":
        parts = cut_to_tf32(registers).reshape(warps, 8, 4, 2, 2)  # group, thread, column half, row half
        return parts.transpose(0, 4, 1, 3, 2).reshape(warps, 16, 8)
    parts = halves(np.ascontiguousarray(registers).view(np.uint16), kind).reshape(warps, 8, 4, 2, 2, 2)
    return parts.transpose(0, 4, 1, 3, 2, 5).reshape(warps, 16, 16)


def _right_factor(registers: np.ndarray, kind: str) -> np.ndarray:
    """B [warps, 16 or 8, 8] from the registers [warps, 8 groups, 4 threads, 2]."""
    warps = len(registers)
    if kind == "tf32":
        return cut_to_tf32(registers).transpose(0, 3, 2, 1).reshape(warps, 8, 8)
    parts = halves(np.ascontiguousarray(registers).view(np.uint16), kind).reshape(warps, 8, 4, 2, 2)
    return parts.transpose(0, 3, 2, 4, 1).reshape(warps, 16, 8)


def multiply(program: Program, i: Instruction) -> Step:
    """mma.sync: D[16, 8] = A B + C in every warp, sums in float32."""
    shape, kind = i.op[3], i.op[-2]
    assert i.op[4:6] == ("row", "col") and i.op[-1] == i.op[6] == "f32" and i.op[7] == kind, i.text
    assert (shape, kind) in (("m16n8k8", "tf32"), ("m16n8k16", "bf16"), ("m16n8k16", "f16")), i.text
    puts = [setter(program, register, "b32") for register in i.parts(0)]
    a, b, c = ([getter(program, register, "b32") for register in i.parts(n)] for n in (1, 2, 3))

    def run(m: Machine, mask: Mask) -> None:
        m.whole_warps(mask)
        x = left_factor(columns(m, a).reshape(-1, 8, 4, 4), kind)
        y = _right_factor(columns(m, b).reshape(-1, 8, 4, 2), kind)
        z = np.matmul(x, y).reshape(-1, 2, 8, 4, 2).transpose(0, 2, 3, 1, 4).reshape(m.count, 4)
        z = z + columns(m, c).view(np.float32)
        z = np.ascontiguousarray(z, np.float32).view(np.uint32)
        for n, put in enumerate(puts):
            put(m, mask, z[:, n].copy())

    return run
