"""PTX text to a flat list of instructions; only what Triton's kernels use: one entry, and no calls."""

from __future__ import annotations

import re
import struct

from .syntax import Address, Imm, Instruction, Kernel, Operand, Reg, Special, Symbol, Vector

_SPECIAL = re.compile(r"%(?:n?tid|n?ctaid|laneid|warpid|n?clusterid|cluster_n?ctaid|cluster_n?ctarank)(?:\.[xyz])?$")
_REG = re.compile(r"\.reg\s+\.(\w+)\s+(.+)")
_PARAM = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)(?:\s+\.ptr[^,\[]*?)?\s+(\w+)(?:\[(\d+)\])?\s*,?\s*$")
_IGNORED = re.compile(r"\.(loc|pragma|file|section)\b")


def bits_of(kind: str) -> int:
    """Bits of a value of a PTX type: 1 for pred, 32 for f32, bf16x2 and so on."""
    if kind == "pred":
        return 1
    found = re.fullmatch(r"(?:bf|tf|[busf])(\d+)(?:x(\d))?", kind)
    assert found is not None, kind
    return 32 if kind == "tf32" else int(found[1]) * int(found[2] or 1)


def parse(text: str) -> Kernel:
    """The only entry of a module."""
    shared = tuple(re.findall(r"\.shared\s+\.align\s+\d+\s+\.b8\s+(\w+)", text))
    head = re.search(r"\.visible\s+\.entry\s+(\w+)\s*\(", text)
    assert head is not None, "no entry"
    close = text.index("\n)", head.end())
    parameters: dict[str, tuple[int, int]] = {}
    for line in filter(None, map(str.strip, text[head.end() : close].splitlines())):
        found = _PARAM.match(line)
        assert found is not None, line
        size = bits_of(found[2]) // 8
        parameters[found[3]] = size * int(found[4] or 1), int(found[1] or size)
    threads = re.search(r"\.reqntid\s+(\d+)", text[close:])
    assert threads is not None, "no .reqntid"
    kernel = Kernel(head[1], parameters, int(threads[1]), {}, shared_symbols=shared)
    begin = text.index("{", close)
    _Body(kernel).read(text[begin + 1 :].splitlines(), text.count("\n", 0, begin) + 1)
    return kernel


class _Scopes:
    """Names that are declared in inner braces (inline assembly) get a suffix."""

    def __init__(self) -> None:
        self.stack: list[dict[str, str]] = [{}]
        self.count = 0

    def enter(self) -> None:
        self.stack.append({})
        self.count += 1

    def leave(self) -> None:
        self.stack.pop()

    def declare(self, name: str) -> str:
        unique = name if len(self.stack) == 1 else f"{name}~{self.count}"
        self.stack[-1][name] = unique
        return unique

    def find(self, name: str) -> str | None:
        for names in reversed(self.stack):
            if name in names:
                return names[name]
        return None


class _Body:
    """Reads the lines between the entry's braces into the kernel."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel, self.scopes = kernel, _Scopes()
        self.pending, self.pending_line = "", 0  # a statement whose semicolon has not come yet
        self.branches: list[tuple[Instruction, str]] = []

    def read(self, lines: list[str], first_line: int) -> None:
        for number, raw in enumerate(lines, first_line):
            line = raw.split("//")[0].strip()
            if _IGNORED.match(line):
                continue
            while line:
                if not self.pending and line[0] == "}" and len(self.scopes.stack) == 1:
                    self._resolve()
                    return
                line = self._next(line, number).strip()
        raise ValueError("the entry does not end")

    def _next(self, line: str, number: int) -> str:
        """Take one thing off the line; returns the rest."""
        if not self.pending:
            if line[0] in "{};":
                if line[0] == "{":
                    self.scopes.enter()
                elif line[0] == "}":
                    self.scopes.leave()
                return line[1:]
            label = re.match(r"([$\w]+):", line)
            if label:
                self.kernel.labels[self.scopes.declare(label[1])] = len(self.kernel.instructions)
                return line[label.end() :]
            self.pending_line = number
        statement, semicolon, rest = line.partition(";")
        self.pending = f"{self.pending} {statement}".strip()
        if semicolon:
            self._statement(self.pending)
            self.pending = ""
        return rest

    def _resolve(self) -> None:
        for instruction, name in self.branches:
            instruction.operands = (Symbol(name),)
            assert name in self.kernel.labels, name

    def _statement(self, text: str) -> None:
        declared = _REG.match(text)
        if declared:
            for name in _split(declared[2]):
                many = re.match(r"(%?\w+)<(\d+)>", name)
                for one in [f"{many[1]}{i}" for i in range(int(many[2]))] if many else [name]:
                    self.kernel.widths[self.scopes.declare(one)] = bits_of(declared[1])
            return
        if text.startswith("."):
            return
        predicate, negated = None, False
        guard = re.match(r"@(!?)([%\w]+)\s+", text)
        if guard:
            name = self.scopes.find(guard[2])
            assert name is not None, text
            predicate, negated = Reg(name), bool(guard[1])
            text = text[guard.end() :]
        op, _, rest = text.replace("\t", " ").partition(" ")
        instruction = Instruction(tuple(op.split(".")), (), predicate, negated, self.pending_line, text)
        if instruction.op[0] == "bra":
            target = rest.strip()
            self.branches.append((instruction, self.scopes.find(target) or target))
        else:
            instruction.operands = tuple(self._operand(part) for part in _split(rest))
        self.kernel.instructions.append(instruction)

    def _operand(self, text: str) -> Operand:
        if text.startswith("{"):
            return Vector(tuple(self._operand(part) for part in _split(text[1:-1])))
        if text.startswith("["):
            first, *more = _split(text[1:-1])
            found = re.match(r"([%$\w]+)\s*(?:\+\s*(-?\w+))?$", first)
            assert found is not None, text
            return Address(self._operand(found[1]), int(found[2] or "0", 0), tuple(map(self._operand, more)))
        if "|" in text:
            return Vector(tuple(self._operand(part.strip()) for part in text.split("|")))
        number = _immediate(text)
        if number is not None:
            return number
        if _SPECIAL.match(text):
            return Special(text)
        assert not text.startswith("!"), text
        name = self.scopes.find(text)
        return Symbol(text) if name is None else Reg(name)


def _split(text: str) -> list[str]:
    """On commas outside of braces and brackets."""
    found, depth, start = [], 0, 0
    for i, letter in enumerate(text):
        depth += (letter in "{[(") - (letter in "}])")
        if letter == "," and not depth:
            found.append(text[start:i].strip())
            start = i + 1
    rest = text[start:].strip()
    return [*found, rest] if rest else found


def _immediate(text: str) -> Imm | None:
    if re.fullmatch(r"0[fF][0-9a-fA-F]{8}", text):
        bits = int(text[2:], 16)
        return Imm(struct.unpack("<f", struct.pack("<I", bits))[0], bits)
    if re.fullmatch(r"0[dD][0-9a-fA-F]{16}", text):
        bits = int(text[2:], 16)
        return Imm(struct.unpack("<d", struct.pack("<Q", bits))[0], bits)
    if re.fullmatch(r"-?(0[xX][0-9a-fA-F]+|\d+)U?", text):
        return Imm(int(text.rstrip("U"), 0))
    return None
