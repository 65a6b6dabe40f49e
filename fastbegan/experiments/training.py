"""The training runs of an experiment: processes of `fastbegan train`, as many at once as there are cores."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..device import core_count
from ..errors import UserError
from ..files import read_json, write_json
from ..runs.folder import RunFolder
from ..training.loop import NOT_FINITE
from .record import Record, Settings
from .scales import SCALES

_STOPPED = 75  # exit code of a run that a signal ended
_POLL, _REPORT = 0.2, 30.0  # seconds between looks at the processes, and between lines of progress


@dataclass(frozen=True)
class Trained:
    """A finished run of an experiment."""

    name: str
    folder: RunFolder
    finite: bool = True
    """False where a number that was not finite ended the run."""

    def last(self) -> dict[str, float]:
        """Means over the last tenth of the rows of metrics, the `ratio` of the losses, and `k_max` over all rows."""
        rows = self.folder.read_metrics()
        tail = rows[-max(1, len(rows) // 10) :]
        means = {name: _mean(tail, name) for name in ("loss_real", "loss_fake", "k", "convergence")}
        return means | {"ratio": means["loss_fake"] / means["loss_real"], "k_max": max(row["k"] for row in rows)}

    def thirds(self) -> dict[str, float]:
        """Means of M over the second third of the rows of metrics, and over the last."""
        rows = self.folder.read_metrics()
        third = max(1, len(rows) // 3)
        return {
            "second_third_M": _mean(rows[third : 2 * third] or rows, "convergence"),
            "last_third_M": _mean(rows[-third:], "convergence"),
        }


class Trainer:
    """Trains the runs of an experiment in its folder; finished runs are not trained again."""

    def __init__(self, record: Record, settings: Settings, device: torch.device, lock: int | None = None) -> None:
        """The processes inherit `lock`, the descriptor of the folder's lock, so it stays locked while one lives."""
        self.folder, self.record, self.display = record.folder, record, record.display
        self.settings, self.device, self._lock = settings, device, lock
        self.scale = SCALES[settings.scale]

    def train(self, options: Mapping[str, Sequence[object]], *, steps: int, may_fail: bool = False) -> list[Trained]:
        """Train runs, as many at once as there are cores; on a GPU one after another.

        Args:
            options: Options of `fastbegan train`, by the run's name.
            steps: Length of each run.
            may_fail: Whether a run may end because a number is not finite.

        Returns:
            The runs, in the order of `options`.

        Raises:
            UserError: A run fails, or a signal has stopped it.
        """
        jobs = 1 if self.device.type == "cuda" else min(core_count(), len(options))
        waiting = {name: self._command(name, flags, steps) for name, flags in options.items()}
        active: dict[str, subprocess.Popen[bytes]] = {}
        codes: dict[str, int] = {}
        for name in list(waiting):
            if self._outcome(name).exists():
                codes[name] = read_json(self._outcome(name))["code"]
                del waiting[name]
        reported = time.monotonic()
        try:
            while waiting or active:
                while waiting and len(active) < jobs:
                    name = next(iter(waiting))
                    active[name] = self._start(name, waiting.pop(name), jobs)
                for name in [name for name, process in active.items() if process.poll() is not None]:
                    codes[name] = self._ended(name, active.pop(name).returncode, steps, may_fail)
                if time.monotonic() - reported > _REPORT:
                    reported = time.monotonic()
                    self.record.save()
                    self.display.say(f"{', '.join(self._progress(active, steps))}; {len(waiting)} more runs to come")
                time.sleep(_POLL)
        finally:
            for process in active.values():
                process.send_signal(signal.SIGTERM)  # makes it write a checkpoint
            for process in active.values():
                process.wait()
        return [Trained(name, self._run(name), codes[name] == 0) for name in options]

    def train_one(self, name: str, options: Sequence[object] = ()) -> Trained:
        """Return the run that --trained names, or train one for the scale's full length."""
        if self.settings.trained is not None:
            return Trained(name, RunFolder(Path(self.settings.trained)))
        return self.train({name: options}, steps=self.scale.steps)[0]

    def _run(self, name: str) -> RunFolder:
        return RunFolder(self.folder / "runs" / name)

    def _outcome(self, name: str) -> Path:
        """The file with the exit code of a finished run."""
        return self.folder / "measures" / f"run-{name}.json"

    def _command(self, name: str, options: Sequence[object], steps: int) -> list[str]:
        settings = self.settings
        defaults = {"--preset": self.scale.preset, "--seed": settings.seed, "--precision": self.scale.precision}
        defaults |= {} if self.scale.filters is None else {"--filters": self.scale.filters}
        chosen = [part for option, value in defaults.items() if option not in options for part in (option, value)]
        fixed = ("--data", settings.data, "--device", self.device, "--steps", steps, "--out", self._run(name).path)
        flags = [*chosen, *self.scale.options, *options, *fixed, "--requeue-code", _STOPPED]
        return [sys.executable, "-m", "fastbegan", "train", *map(str, flags)]

    def _start(self, name: str, command: list[str], jobs: int) -> subprocess.Popen[bytes]:
        self.display.say(f"training {name}: fastbegan {shlex.join(command[3:])}")
        # a single run gets half of the cores: the others bring little, and the machine may be shared
        threads = {"OMP_NUM_THREADS": str(max(1, core_count() // max(jobs, 2)))}
        with (self.folder / "runs" / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                command,
                stdout=log,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ | threads,
                start_new_session=True,  # else Ctrl-C would reach it twice, from the terminal and from this process
                pass_fds=() if self._lock is None else (self._lock,),
            )

    def _ended(self, name: str, code: int, steps: int, may_fail: bool) -> int:
        log = self.folder / "runs" / f"{name}.log"
        if code == _STOPPED:
            raise UserError(f"run {name} was told to stop before its {steps:,} steps; start this again to go on")
        if code != 0 and not (may_fail and code == NOT_FINITE):
            lines = log.read_text(encoding="utf-8", errors="replace").splitlines() or [""]
            raise UserError(f"run {name} ended with exit code {code} ({lines[-1].strip()}); all it said is in {log}")
        rows = self._run(name).read_metrics()
        rate = f", {rows[-1]['images_per_second']:g} images/s at its end" if rows else ""
        write_json(self._outcome(name), {"code": code})
        self.display.say(f"trained {name}" + (rate if code == 0 else ": a number was not finite"))
        return code

    def _progress(self, active: Mapping[str, object], steps: int) -> Iterator[str]:
        for name in active:
            rows = self._run(name).read_metrics()
            yield f"{name} {rows[-1]['step'] if rows else 0:,} of {steps:,} steps"


def _mean(rows: list[dict[str, Any]], name: str) -> float:
    return float(np.mean([row[name] for row in rows]))
