"""Messages and progress of a command: a live line on a terminal, plain lines elsewhere."""

from __future__ import annotations

import os
import sys
import time
import warnings
from collections.abc import Iterable
from typing import Any, NoReturn

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from .files import printable

_PLAIN_SECONDS = 10.0  # between plain lines


def duration(seconds: float) -> str:
    """Seconds as text: `75` is `1:15`, `3700` is `1:01:40`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _left(seconds: float | None) -> str:
    """What a line of progress says of the time that is left; nothing where nobody knows."""
    return "" if seconds is None else f"  {duration(seconds)} left"


def print_facts(facts: Iterable[tuple[str, str]]) -> None:
    """Print a line per fact, name and value in two columns."""
    for name, value in facts:
        print(f"{name:<12}{value}")


class _Console(Console):
    def on_broken_pipe(self) -> NoReturn:
        raise  # the BrokenPipeError, of which rich makes an exit without a word


class Display:
    """Messages and progress on standard output. Used as a context manager, which closes the live line.

    Work goes on where the output cannot be written any more, as in `fastbegan train | head`; a warning says so once.
    """

    def __init__(self, *, quiet: bool = False) -> None:
        """`quiet` prints nothing, for ranks other than 0 and for JSON output."""
        self.console = _Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._live: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._last = float("-inf")
        self._numbers = ""

    def __enter__(self) -> Display:
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=10),
                TextColumn("{task.fields[note]}"),
            )
            self._live = Progress(*columns, console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, message: str) -> None:
        """Print a line that stays."""
        try:
            self.console.print("\n".join(map(printable, message.split("\n"))), markup=False)
        except OSError as error:
            self.console.quiet = True
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what the output still holds back
            why = error.strerror or error
            warnings.warn(f"the output cannot be written ({why}); the work goes on; Ctrl-C ends it", stacklevel=2)

    def preparing(self, work: str, done: int, total: int) -> None:
        """Show progress of preparing images: `work` in words, `done` of `total` entries, 0 where nobody knows."""
        self._show(work, done / max(total, 1), f"{done:,} of {total:,}" if total else f"{done:,}", last=done == total)

    def trying(self, done: int, total: int) -> None:
        """Show progress of trying kernels that this kind of GPU has not run yet."""
        self._show("trying kernels on this GPU, once:", done / max(total, 1), f"{done} of {total}", last=done == total)

    def step(self, fraction: float, step: int, seconds_left: float | None) -> None:
        """Show progress between two log rows, from numbers that need no read from the device.

        `fraction` of the run is done, from 0 to 1; `step` is the number of the last step. `seconds_left` is None where
        nobody knows yet.
        """
        if self._live is None and not self._due():
            return
        note = f"{fraction:4.0%}  step {step:,}{_left(seconds_left)}"
        self._show("training", fraction, note + (self._numbers if self._live else ""))

    def training(self, fraction: float, row: dict[str, Any], seconds_left: float | None) -> None:
        """Show progress of training from a row of metrics, as metrics.jsonl holds it; `fraction` of the run is done."""
        numbers = (
            f"L(x) {row['loss_real']:.4f}  L(G(z)) {row['loss_fake']:.4f}  k {row['k']:.4f}  M {row['convergence']:.4f}"
        )
        self._numbers = f"\n{numbers}"  # a second line: 80 columns are too short for all of it
        speed = f"{row['images']:,} images  {row['images_per_second']:,.0f} img/s{_left(seconds_left)}"
        speed += f"  {row['data_wait']:.1%} waiting for data"
        note = f"{fraction:4.0%}  {speed}" + (self._numbers if self._live else f"  {numbers}")
        self._show("training", fraction, note, last=fraction >= 1)

    def _due(self) -> bool:
        return time.monotonic() - self._last >= _PLAIN_SECONDS

    def _show(self, work: str, fraction: float, note: str, *, last: bool = False) -> None:
        if self._live is not None:
            if work not in self._tasks:
                self._tasks[work] = self._live.add_task(work, total=1.0, note=note)
            self._live.update(self._tasks[work], completed=fraction, note=note)
        elif last or self._due():
            self._last = time.monotonic()
            self.say(f"{time.strftime('%H:%M:%S')}  {work}  {note}")
