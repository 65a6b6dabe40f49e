"""executed.json: what was executed, by a hash of its PTX that names and places in the source do not change."""

from __future__ import annotations

import datetime
import hashlib
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import triton

RECORD = Path(__file__).parent / "executed.json"
Row = dict[str, Any]


def normalized(ptx: str) -> str:
    """PTX without names of kernels, comments and all that tells lines of the source."""
    code = ptx.partition("\n\t.section")[0]  # debug sections follow the code
    code = re.sub(r"//.*", "", code)
    name = re.search(r"\.entry\s+(\w+)", code)
    assert name is not None, "no entry"
    code = re.sub(rf"\b{name[1]}(?=\b|_param)", "kernel", code)
    lines = (" ".join(line.split()) for line in code.splitlines())
    kept = (line for line in lines if line and not re.match(r"\.(loc|file)\b|\$L__(tmp|func)\w*:", line))
    return "\n".join(kept) + "\n"


def hash_of(texts: Iterable[str]) -> str:
    """Of the different PTX texts, in any order."""
    whole = "".join(sorted({normalized(text) for text in texts}))
    return hashlib.sha256(whole.encode()).hexdigest()[:16]


class Record:
    """The rows, written whenever one changes."""

    def __init__(self, path: Path = RECORD) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []

    def holds(self, name: str, sm: int, ptx: str) -> bool:
        """Whether this was executed, with any version of Triton that makes the same of it."""
        return any((row["name"], row["sm"], row["ptx"]) == (name, sm, ptx) for row in self.rows)

    def enter(self, name: str, sm: int, ptx: str, excess: float) -> None:
        """Put a result in the place of the one for this version of Triton."""
        key = {"name": name, "sm": sm, "triton": triton.__version__}
        self.rows = [row for row in self.rows if any(row[word] != value for word, value in key.items())]
        today = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
        self.rows.append(key | {"ptx": ptx, "excess": round(excess, 3), "date": today})
        self._write()

    def keep(self, names: Iterable[str], sm: int) -> None:
        """Drop rows of configurations that are no more."""
        known = set(names)
        self.rows = [row for row in self.rows if row["sm"] != sm or row["name"] in known]
        self._write()

    def _write(self) -> None:
        self.rows.sort(key=lambda row: (row["triton"], row["sm"], row["name"]))
        lines = ",\n".join(map(json.dumps, self.rows))
        new = self.path.with_suffix(".new")
        new.write_text(f'{{"rows": [\n{lines}\n]}}\n')
        new.replace(self.path)
