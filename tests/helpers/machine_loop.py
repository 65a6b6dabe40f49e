"""The main loop of a matrix product in its machine code: which instructions one step has.

What stands here is counted, and holds for any chip. Instructions of a called function (a division in the float32
kernels) lie outside the loop and are not counted.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

_FIRST = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@(!?U?PT?\d*)\s+)?([A-Z][\w.]*)\s*(.*?)\s*;\s*/\* 0x[0-9a-f]{16} \*/")
_SECOND = re.compile(r"^\s*/\* 0x([0-9a-f]{16}) \*/")
PRODUCTS = ("HGMMA", "HMMA", "FFMA")  # the first of these that a kernel has computes its products
_NAMES = {
    "product": "HMMA HGMMA FFMA",
    "matrix load": "LDSM",
    "shared": "LDS STS STSM LDL STL",  # spilled registers (LDL, STL) go the same way
    "copy": "LDGSTS UTMALDG",
    "global": "LDG STG",
    "imad": "IMAD",
    "barrier": "BAR",
    "order": "DEPBAR LDGDEPBAR WARPSYNC SYNCS WARPGROUP FENCE MEMBAR",
    "convert": "I2F F2I MUFU I2FP",
    "flow": "BRA BSSY BSYNC CALL EXIT NOP YIELD",
}
_KINDS = {word: kind for kind, words in _NAMES.items() for word in words.split()}


class Instruction(NamedTuple):
    """One machine instruction: its address, name with modifiers, operands, and the assembler's schedule of it."""

    address: int
    name: str
    operands: str
    kind: str
    control: int = 0

    @property
    def stall(self) -> int:
        """Cycles until the warp may issue its next instruction."""
        return self.control & 15

    @property
    def sets(self) -> int:
        """The scoreboard that is free once the result is there; 7 is none."""
        return self.control >> 5 & 7

    @property
    def waits(self) -> tuple[int, ...]:
        """Scoreboards that are waited for."""
        return tuple(number for number in range(6) if self.control >> 11 + number & 1)

    @property
    def width(self) -> int:
        """Bytes that each thread loads, stores or copies."""
        return next((size for word, size in ((".128", 16), (".64", 8), (".U16", 2)) if word in self.name), 4)

    @property
    def moved(self) -> int:
        """Bytes of shared memory that a warp reads or writes; a matrix of LDSM has eight rows of 16 bytes."""
        if self.kind == "matrix load":
            return 128 * (int(self.name[-1]) if self.name.endswith((".2", ".4")) else 1)
        return 32 * self.width if self.kind == "shared" or self.name.startswith("LDGSTS") else 0


def _kind(name: str, predicate: str | None) -> str:
    """The class of an instruction; "flow" where it never executes, "alu" for the rest of the integer work."""
    word = name.partition(".")[0]
    if predicate in ("!PT", "!UPT"):
        return "flow"
    return _KINDS.get(word) or ("uniform" if word.startswith("U") or word in ("R2UR", "S2UR") else "alu")


def instructions(text: str) -> list[Instruction]:
    """All instructions of `cuobjdump -sass`. The schedule is in the second word of each, on a line of its own."""
    found: list[Instruction] = []
    for line in text.splitlines():
        if first := _FIRST.search(line):
            address, predicate, name, operands = first.groups()
            found.append(Instruction(int(address, 16), name, operands, _kind(name, predicate)))
        elif found and (second := _SECOND.match(line)):
            found[-1] = found[-1]._replace(control=int(second[1], 16) >> 41 & 0x1FFFFF)
    return found


def main_loop(code: Sequence[Instruction]) -> list[Instruction]:
    """The loop with the most products, and the innermost of such; empty without one."""
    words = {part.name.partition(".")[0] for part in code}
    product = next((word for word in PRODUCTS if word in words), "none")
    best: list[Instruction] = []
    most = 1
    for last, branch in enumerate(code):
        target = re.search(r"0x([0-9a-f]+)", branch.operands)
        if not branch.name.startswith("BRA") or not target or int(target[1], 16) >= branch.address:
            continue
        body = [part for part in code[: last + 1] if part.address >= int(target[1], 16)]
        made = sum(part.name.startswith(product) for part in body)
        if made > most or (made == most and (not best or len(body) < len(best))):
            best, most = body, made
    return best


def multiply_adds(product: Instruction) -> int:
    """Of one product instruction: HMMA and FFMA of a warp, HGMMA of its four warps."""
    if shape := re.match(r"HGMMA\.(\d+)x(\d+)x(\d+)", product.name):
        rows, columns, depth = map(int, shape.groups())
        return rows * columns * depth
    if shape := re.match(r"HMMA\.168(8|16)\b", product.name):
        return 16 * 8 * int(shape[1])
    return 32


def group_bytes(product: Instruction, size: int) -> int:
    """What an HGMMA reads of shared memory: its columns, and its rows where registers do not hold them."""
    rows, columns, depth = map(int, re.findall(r"\d+", product.name)[:3])
    return ((rows if "gdesc" in product.operands.split(",")[1] else 0) + columns) * depth * size


class Tile(NamedTuple):
    """What a kernel's name says of its tile, which need not be a shipped one."""

    pixels: int
    outputs: int
    inputs: int
    warps: int
    stages: int
    dtype: str

    @property
    def size(self) -> int:
        """Bytes of a value."""
        return 2 if self.dtype in ("bf16", "fp16") else 4

    @property
    def multiply_adds(self) -> int:
        """Of a program and step."""
        return self.pixels * self.outputs * self.inputs

    @property
    def loaded(self) -> int:
        """Bytes of both operands that a program loads for a step."""
        return (self.pixels + self.outputs) * self.inputs * self.size


def tile_of(kernel: str) -> Tile:
    """From a name like "conv forward bf16 tma 1x8x16x128x64 w8 s3"."""
    found = re.search(r" (bf16|fp16|fp32|tf32) \w+ ([\dx]+) w(\d+) s(\d+)", kernel)
    assert found is not None, kernel
    *image, outputs, inputs = map(int, found[2].split("x"))
    pixels = 1
    for size in image:
        pixels *= size
    return Tile(pixels, outputs, inputs, int(found[3]), int(found[4]), found[1])


@dataclass(frozen=True)
class Counts:
    """One step of the loop: instructions of a warp, and bytes that a program moves to and from shared memory.

    `alu`, `imad` and `uniform` are the integer work: addresses, masks, counters and moves. They are instructions of the
    integer unit, of the multiplier, and of the unit that works once a warp.
    """

    instructions: float
    products: float
    alu: float
    imad: float
    uniform: float
    converts: float
    barriers: float
    shared: float

    @property
    def integers(self) -> float:
        """Integer instructions to each product instruction."""
        return (self.alu + self.imad + self.uniform) / self.products


def steps_in(loop: Sequence[Instruction], tile: Tile) -> int:
    """The steps of the sum that one round of the loop does: one, where the compiler did not unroll it."""
    group = 4 if any(part.name.startswith("HGMMA") for part in loop) else 1
    made = sum(multiply_adds(part) for part in loop if part.kind == "product") * tile.warps // group
    return max(1, round(made / tile.multiply_adds))


def count(loop: Sequence[Instruction], tile: Tile) -> Counts:
    """The figures of one step."""
    kinds = Counter(part.kind for part in loop)
    steps = steps_in(loop, tile)
    shared = sum(tile.warps * part.moved for part in loop if part.kind != "copy")
    shared += sum(tile.warps // 4 * group_bytes(part, tile.size) for part in loop if part.name.startswith("HGMMA"))

    def each(number: int) -> float:
        return number / steps if number % steps else number // steps

    return Counts(
        instructions=each(len(loop)),
        products=each(kinds["product"]),
        alu=each(kinds["alu"]),
        imad=each(kinds["imad"]),
        uniform=each(kinds["uniform"]),
        converts=each(kinds["convert"]),
        barriers=each(kinds["barrier"]),
        shared=each(shared) + tile.loaded,
    )
