"""Signals that ask a run to end."""

from __future__ import annotations

import signal
import time
import types

_ECHO = 5.0  # seconds within which a scheduler, a terminal and torchrun each pass on the same wish to a rank


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 ask for an end at the next step boundary; a second signal ends at once.

    While `patient` is False (nothing is there to be saved yet), the first one ends at once too, by KeyboardInterrupt.
    All but SIGINT may come twice, from a scheduler and from what started this process: within five seconds they are
    one. With `echoes` so are SIGINTs.
    """

    def __init__(self, *, echoes: bool = False) -> None:
        self.signal: int | None = None
        self.patient, self.echoes = False, echoes
        self._when = 0.0

    def __enter__(self) -> StopRequest:
        names = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last does not exist on Windows
        self._previous = {s: signal.signal(s, self._handle) for n in names if (s := getattr(signal, n, None))}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        now = time.monotonic()
        may_echo = self.echoes or number != signal.SIGINT
        if may_echo and self.signal is not None and now - self._when < _ECHO:
            return
        if not self.patient or self.signal is not None:
            raise KeyboardInterrupt
        self.signal, self._when = number, now
