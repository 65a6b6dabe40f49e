"""Signals that ask a run to end."""

from __future__ import annotations

import signal
import time
import types

STOPPED_BY_USER = 130  # exit code
_ECHO = 5.0  # seconds within which a scheduler, a terminal and torchrun each pass on the same wish to a rank


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 ask for an end at the next step boundary; a second one is a KeyboardInterrupt.

    While `patient` is False (nothing is there to be saved yet), so is the first.
    All but SIGINT may come twice, from a scheduler and from what started this process: within five seconds they are
    one. With `echoes` so are SIGINTs. With `ranks` only SIGINT ends at once: a SIGTERM may mean that another rank died,
    and whose end it was has yet to be found.
    """

    def __init__(self, *, echoes: bool = False, ranks: bool = False) -> None:
        self.signal: int | None = None
        self.patient, self.echoes, self.ranks = False, echoes, ranks
        self._when = 0.0

    def __enter__(self) -> StopRequest:
        names = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last does not exist on Windows
        self._previous = {s: signal.signal(s, self._handle) for n in names if (s := getattr(signal, n, None))}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """From now on nobody can ask for anything: the process is about to end, and must do it in order."""
        for number in self._previous:
            signal.signal(number, signal.SIG_IGN)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        may_echo = self.echoes or number != signal.SIGINT
        if may_echo and self.signal is not None and now - self._when < _ECHO:
            return
        patient = self.patient or (self.ranks and number != signal.SIGINT)
        if not patient or self.signal is not None:
            raise KeyboardInterrupt
        self.signal, self._when = number, now
