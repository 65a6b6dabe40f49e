"""Faults planted into compiled PTX, to see that the machine notices them: its own test.

python -m tests.ptx.faults CAPABILITY NAME [KIND ...] tries every place of a configuration where a kind can be planted.
What goes unnoticed is harmless there, as a wait that another makes redundant, or a hole in the machine: look at each.
"""

from __future__ import annotations

import os

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")  # as the gate

import dataclasses
import json
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from .configurations import Configuration, configurations, gate_ptx, run
from .launch import Device
from .machine import Stuck
from .report import ERRORS

_DELETIONS = {
    "no wait": r"cp\.async\.wait_group",
    "no commit": r"cp\.async\.commit_group",
    "no barrier": r"bar\.sync",
    "no warp barrier": r"bar\.warp\.sync",
    "no wgmma wait": r"wgmma\.wait_group",
    "no wgmma commit": r"wgmma\.commit_group",
    "no wgmma fence": r"wgmma\.fence",
    "no proxy fence": r"fence\.proxy\.async",
    "no expect": r"(?:@\S+ )?mbarrier\.arrive\.expect_tx",
    "no store": r"(?:@\S+ )?(st\.global|cp\.async\.bulk\.tensor\.\dd\.global)",
    "no store wait": r"cp\.async\.bulk\.wait_group",
}


def _grown(line: str, pattern: str, by: int) -> str:
    """The number that `pattern` marks as (number) grows."""

    def grow(found: re.Match[str]) -> str:
        start, end = found.start(1) - found.start(), found.end(1) - found.start()
        return f"{found[0][:start]}{int(found[1]) + by}{found[0][end:]}"

    return re.sub(pattern, grow, line, count=1)


def _moved(line: str) -> str:
    """An address in shared memory is 16 bytes further."""
    return re.sub(r"\[(%r\d+)(?:\+(\d+))?\]", lambda found: f"[{found[1]}+{int(found[2] or 0) + 16}]", line)


def _same_factor(line: str) -> str:
    """The second descriptor of a product is the first."""
    found = re.search(r"(%rd\d+), (%rd\d+)", line)
    return line if found is None else line.replace(found[0], f"{found[1]}, {found[1]}")


_CHANGES: dict[str, tuple[str, Callable[[str], str]]] = {
    "one wait less": (r"(cp\.async|wgmma)\.wait_group", lambda line: _grown(line, r"wait_group[.\w]*\s+(\d+);", 1)),
    "matrix shifted": (r"ldmatrix", _moved),
    "store shifted": (r"(?:@\S+ )?(st\.shared|stmatrix)", _moved),
    "copy shifted": (r"(?:@\S+ )?cp\.async\.c[ag]", lambda line: _grown(line, r"\[ %r\d+ \+ (\d+) \]", 16)),
    "address shifted": (r"(?:@\S+ )?cp\.async\.c[ag]", lambda line: _grown(line, r"\[ %rd\d+ \+ (\d+) \]", 16)),
    "mask forgotten": (r"(?:@\S+ )?cp\.async\.c[ag]", lambda line: re.sub(r"(0x\w+), %r\d+;", r"\1, \1;", line)),
    "factor swapped": (r"mma\.sync", lambda line: re.sub(r"\{ (%r\d+), (%r\d+) \}", r"{ \2, \1 }", line)),
    "descriptor moved": (r"wgmma\.mma_async", _same_factor),
    "no mbarrier wait": (r".*mbarrier\.try_wait", lambda line: "setp.eq.b32 complete, 0, 0;"),
    "parity wrong": (r".*mbarrier\.try_wait", lambda line: re.sub(r", (%r\d+);", ", 1;", line)),
    "bytes wrong": (r".*expect_tx", lambda line: _grown(line, r"\], (\d+);", -2)),
}
_BARRIERS = {"two barriers less": 2, "three barriers less": 3, "no barriers in a loop": 0}
_OF_ADDRESSES = ("address shifted", "mask forgotten")
KINDS = (*_DELETIONS, *_CHANGES, *_BARRIERS)


@dataclass(frozen=True)
class Fault:
    """PTX with one fault; `line` is where, and `text` what stood there."""

    line: int
    text: str
    ptx: str


def faults(ptx: str, kind: str) -> Iterator[Fault]:
    """One for each place."""
    lines = ptx.split("\n")
    end = next(n for n, line in enumerate(lines) if "L__func_end" in line)
    if kind in _BARRIERS:
        for gone in _barriers(lines[:end], _BARRIERS[kind]):
            left = ("" if n in gone else line for n, line in enumerate(lines))
            yield Fault(gone[0] + 1, lines[gone[0]].strip(), "\n".join(left))
        return
    pattern, change = _CHANGES[kind] if kind in _CHANGES else (_DELETIONS[kind], lambda line: "")
    for n, line in enumerate(lines[:end]):
        if re.match(rf"\s*(?:{pattern})", line) and (new := change(line)) != line:
            yield Fault(n + 1, line.strip()[:90], "\n".join([*lines[:n], new, *lines[n + 1 :]]))


def _barriers(lines: list[str], many: int) -> Iterator[list[int]]:
    """Barriers to take away: `many` one after another; 0: all of an inner loop."""
    found = [n for n, line in enumerate(lines) if re.match(r"\s*bar\.sync", line)]
    if many:
        yield from (found[first : first + many] for first in range(len(found) - many + 1))
        return
    labels = {label[1]: n for n, line in enumerate(lines) if (label := re.match(r"(\$L__BB\w+):.*Inner Loop", line))}
    for n, line in enumerate(lines):
        jump = re.search(r"bra(?:\.uni)? \s*(\$L__BB\w+);", line)
        if jump and labels.get(jump[1], n) < n and (gone := [b for b in found if labels[jump[1]] < b < n]):
            yield gone


@dataclass
class Tally:
    """What became of the faults of a kind: how those that were noticed showed, and the places of the others."""

    kind: str
    noticed: int = 0
    how: dict[str, int] = field(default_factory=dict)
    missed: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        head = f"{self.kind}: noticed {self.noticed} of {self.noticed + len(self.missed)} by {self.how}"
        return "\n".join([head, *(f"    MISSED {place}" for place in self.missed)])


def signs(configuration: Configuration, capability: int, fault: Fault) -> list[str]:
    """By what a fault shows: kinds of errors, a wrong result, or an exception."""
    device = Device(capability, change=lambda ptx: fault.ptx)
    try:
        outcome = run(dataclasses.replace(configuration, case=None), capability, device)
    except Stuck:
        return ["stuck"]
    except (RuntimeError, AssertionError) as error:
        return [type(error).__name__]
    return [kind for kind in outcome.notes if kind in ERRORS] + ["result"] * (outcome.excess > 1)


def tally(configuration: Configuration, capability: int, kind: str) -> Tally:
    """Every place of a kind, on one layer. The configuration has one kernel."""
    assert configuration.case is not None
    ptx = gate_ptx(configuration.case, capability)
    found, layers = Tally(kind), configuration.problems
    # most show on the smaller layer, but its block of outputs is mostly empty
    layers = layers[:1] if kind in _OF_ADDRESSES else layers[-1:]
    configuration = dataclasses.replace(configuration, problems=layers)
    for fault in faults(ptx, kind):
        shown = signs(configuration, capability, fault)
        found.noticed += bool(shown)
        for one in shown:
            found.how[one] = found.how.get(one, 0) + 1
        if not shown:
            found.missed.append(f"{fault.line}: {fault.text}")
    return found


def named(name: str, capability: int) -> Configuration:
    """A configuration by its whole name."""
    return next(one for one in configurations(capability) if one.name == name)


def main() -> None:
    """See the module's text. The last line is JSON."""
    capability, name, *kinds = sys.argv[1:]
    torch.set_num_threads(1)
    configuration, found = named(name, int(capability)), {}
    for kind in kinds or KINDS:
        one = tally(configuration, int(capability), kind)
        if one.noticed or one.missed:
            print(one, flush=True)
            found[kind] = {"noticed": one.noticed, "missed": len(one.missed)}
    print(json.dumps(found))


if __name__ == "__main__":
    main()
