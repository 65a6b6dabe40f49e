"""Whether a change cost anything: ratios against those that were accepted on the same device."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastbegan.files import read_json, write_json
from fastbegan.measure.machine import slug
from fastbegan.measure.results import Row

BAND = 0.10  # how far a ratio may fall under the accepted one


class Accepted:
    """The ratios of a device, from FOLDER/<device>.json; a device without a file is only reported on."""

    def __init__(self, folder: Path, machine: dict[str, Any]) -> None:
        self.path, self.machine = folder / f"{slug(machine)}.json", machine
        self.known = self.path.exists()
        stored = read_json(self.path) if self.known else {"machine": {}, "ratios": {}}
        self.ratios: dict[str, float] = stored["ratios"]
        # what several runs of one commit reached is put together: some of it is luck that lasts as long as a process
        self._same = stored["machine"].get("commit") == machine.get("commit") is not None

    def fell(self, row: Row) -> bool:
        """Whether the row's ratio is more than the band under the accepted one; notes that one in the row."""
        row.accepted = self.ratios.get(row.key)
        return row.accepted is not None and row.ratio is not None and row.ratio < (1 - BAND) * row.accepted

    def accept(self, key: str, *ratios: float | None) -> None:
        """From now on hold this benchmark to the lowest of what it reached at this commit."""
        known = self.ratios.get(key) if self._same else None
        if reached := [ratio for ratio in (*ratios, known) if ratio is not None]:
            self.ratios[key] = round(min(reached), 3)

    def save(self) -> None:
        """Write all accepted ratios; those of benchmarks that this run left out stay."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        ratios = dict(sorted(self.ratios.items()))
        write_json(self.path, {"machine": self.machine, "ratios": ratios})
