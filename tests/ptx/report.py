"""What went wrong while a kernel ran: counted by kind and instruction, the first example kept."""

from __future__ import annotations

from dataclasses import dataclass, field

ERRORS = frozenset(
    (
        "global out of bounds",
        "global misaligned",
        "global uninitialised read",
        "global read-only written",
        "global race",
        "global not written",
        "shared out of bounds",
        "shared misaligned",
        "shared uninitialised read",
        "shared race RAW",
        "shared race WAR",
        "shared race WAW",
        "shared warp race",
        "shared read of data in flight",
        "shared write over data in flight",
        "async read overwritten",
        "proxy fence missing",
        "proxy fence missing after cp.async",
        "divergent warp instruction",
        "division by zero",
        "barrier",
        "descriptor",
        "tensor copy in flight at exit",
    )
)
NOTES = frozenset(
    (
        "masked copy address out of bounds",
        "copies in flight at exit",
        "same value written twice",
        "register never written",
    )
)


@dataclass
class _Entry:
    count: int
    text: str
    example: str


@dataclass
class Report:
    """What was found, by kind and line of the PTX (0 for a launch as a whole)."""

    found: dict[tuple[str, int], _Entry] = field(default_factory=dict)
    forgiven: tuple[str, ...] = ()  # errors that are known to be harmless in this kernel

    def add(self, kind: str, line: int, text: str, count: int, example: str) -> None:
        """`text` is the instruction that was being executed."""
        assert kind in ERRORS or kind in NOTES, kind
        self.found.setdefault((kind, line), _Entry(0, text, example)).count += int(count)

    @property
    def errors(self) -> int:
        """How many errors there were. Notes do not count."""
        return sum(entry.count for (kind, _), entry in self.found.items() if self._counts(kind))

    def _counts(self, kind: str) -> bool:
        return kind in ERRORS and kind not in self.forgiven

    def kinds(self) -> dict[str, int]:
        """How often each kind was found."""
        totals: dict[str, int] = {}
        for (kind, _), entry in self.found.items():
            totals[kind] = totals.get(kind, 0) + entry.count
        return totals

    def __str__(self) -> str:
        lines = [
            f"{'ERROR' if self._counts(kind) else 'note '} {kind} x{entry.count} at line {line}: {entry.text[:100]} "
            f"({entry.example})"
            for (kind, line), entry in sorted(self.found.items(), key=lambda item: item[0][1])
        ]
        return "\n".join(lines)
