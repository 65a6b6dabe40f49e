"""What the pretended devices have seen: faults, waits and copies, each counted by its place in the project."""

from __future__ import annotations

import atexit
import json
import os
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import NoReturn

RACE = "race"
FREED_EARLY = "freed early"
PINNED_REUSED = "pinned memory changed too soon"
GRAPH_READS_FREED = "a graph reads freed memory"
MIXED = "mixed devices"
CAPTURE = "not allowed in a capture"
ERRORS = frozenset((RACE, FREED_EARLY, PINNED_REUSED, GRAPH_READS_FREED, MIXED, CAPTURE))

WAIT = "the host waits"
SYNCHRONIZE = "the host waits for all"  # asked for by name
EVENT = "the host waits for an event"  # asked for by name
PAGEABLE = "copy from pageable memory"  # waits too
PINNED = "copy from pinned memory"
NOTE = "note"

Finding = tuple[str, str, str]  # kind, what, where

_HERE = str(Path(__file__).parent) + os.sep
_ROOT = str(Path(__file__).parents[2]) + os.sep
_LIBRARY = str(Path(os.__file__).parent) + os.sep
_EXAMINED = (f"{_HERE}scenarios", f"{_HERE}planted")  # they stand for the project


class Findings:
    """Counts of all findings of this process."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self.counts: Counter[Finding] = Counter()
        self.launches: Counter[str] = Counter()
        self.graphs: list[dict[str, int]] = []  # of each that was captured, how much of what is in it

    def note(self, kind: str, what: str, where: str | None = None) -> None:
        where = place() if where is None else where
        with self._lock:
            self.counts[kind, what, where] += 1

    def snapshot(self) -> Counter[Finding]:
        """The counts as they are now, for `since`."""
        with self._lock:
            return self.counts.copy()

    def since(self, before: Counter[Finding]) -> list[str]:
        """What came after a snapshot, a line each."""
        return [told(finding, count) for finding, count in sorted((self.snapshot() - before).items())]

    def errors_since(self, before: Counter[Finding]) -> list[str]:
        """The faults, whatever the code wants, that came after a snapshot, a line each."""
        found = sorted((self.snapshot() - before).items())
        return [told(finding, count) for finding, count in found if finding[0] in ERRORS]


FINDINGS = Findings()


def told(finding: Finding, count: int = 1) -> str:
    kind, what, where = finding
    return f"{kind}: {what} ({where})" + (f", {count} times" if count > 1 else "")


def place(depth: int = 3) -> str:
    """The innermost frames that are the project's, as `file:line < file:line`."""
    found: list[str] = []
    frame = sys._getframe(1)
    while frame is not None and len(found) < depth:
        if name := _project_file(frame.f_code.co_filename):
            found.append(f"{name}:{frame.f_lineno}")
        frame = frame.f_back
    return " < ".join(found) or "nowhere in the project"


_names: dict[str, str] = {}


def _project_file(path: str) -> str:
    """How a file of the project is shown; empty for torch, the library and the pretended devices themselves."""
    name = _names.get(path)
    if name is None:
        emulation = path.startswith(_HERE) and not path.startswith(_EXAMINED)
        foreign = emulation or "site-packages" in path or path.startswith(_LIBRARY) or not path.startswith("/")
        name = _names[path] = "" if foreign else path.removeprefix(_ROOT)
    return name


def _write_report() -> None:
    report = {
        "process": os.getpid(),
        "command": sys.argv,
        "errors": FINDINGS.errors_since(Counter()),
        "findings": [[*finding, count] for finding, count in sorted(FINDINGS.snapshot().items())],
        "graphs": FINDINGS.graphs,
        "launches": FINDINGS.launches,
    }
    with Path(os.environ["PRETENDED_REPORT"]).open("a") as file:
        file.write(json.dumps(report) + "\n")


def report_at_exit() -> None:
    """Write PRETENDED_REPORT when the process ends: by itself, or by os._exit as ranks do."""
    if not os.environ.get("PRETENDED_REPORT"):
        return
    atexit.register(_write_report)
    leave = os._exit

    def leave_reported(status: int) -> NoReturn:
        _write_report()
        leave(status)

    os._exit = leave_reported
