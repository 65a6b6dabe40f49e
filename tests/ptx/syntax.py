"""What a parsed kernel is made of."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Reg:
    """A register, or a predicate."""

    name: str


@dataclass(frozen=True)
class Imm:
    """A number. Floats that are written by their bits (0f..., 0d...) keep these too."""

    value: int | float
    bits: int = 0


@dataclass(frozen=True)
class Special:
    """%tid.x and its like."""

    name: str


@dataclass(frozen=True)
class Symbol:
    """The start of shared memory, a parameter, or a label."""

    name: str


@dataclass(frozen=True)
class Vector:
    """Operands in braces, or the two results in `a|p`."""

    parts: tuple[Operand, ...]


@dataclass(frozen=True)
class Address:
    """[base + offset], with the further operands of a tensor copy."""

    base: Operand
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


Operand = Reg | Imm | Special | Symbol | Vector | Address


@dataclass
class Instruction:
    """One instruction; `op` is its name cut at the dots, as ("add", "s32")."""

    op: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Reg | None = None
    negated: bool = False
    line: int = 0
    text: str = ""

    def register(self, index: int) -> Reg:
        """The operand, which is a register."""
        operand = self.operands[index]
        assert isinstance(operand, Reg), self.text
        return operand

    def number(self, index: int) -> int:
        """The operand, which is a whole number."""
        operand = self.operands[index]
        assert isinstance(operand, Imm) and isinstance(operand.value, int), self.text
        return operand.value

    def address(self, index: int) -> Address:
        """The operand, which is an address."""
        operand = self.operands[index]
        assert isinstance(operand, Address), self.text
        return operand

    def parts(self, index: int) -> tuple[Operand, ...]:
        """The parts of a vector; any other operand is its only part."""
        operand = self.operands[index]
        return operand.parts if isinstance(operand, Vector) else (operand,)


@dataclass
class Kernel:
    """The only entry of a module."""

    name: str
    parameters: dict[str, tuple[int, int]]  # bytes each, alignment
    threads: int
    widths: dict[str, int]  # bits of each register, 1 for predicates
    instructions: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared_symbols: tuple[str, ...] = ()
