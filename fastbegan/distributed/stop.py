"""Signals that end a run."""

from __future__ import annotations

import signal
import time
import types

STOPPED_BY_USER = 130  # exit code
_ECHO = 5.0  # seconds within which a scheduler, a terminal and torchrun may each forward the same request


class StopRequest:
    """Records the first SIGINT, SIGTERM or SIGUSR1 in `signal`; a second one raises KeyboardInterrupt.

    The loop reads `signal` at step boundaries. While `patient` is False there is nothing to save yet, and the first
    signal raises as well. A scheduler and a launcher may both forward one request, so signals other than SIGINT within
    five seconds count as one.

    Args:
        echoes: Count SIGINTs within five seconds as one too.
        ranks: There are several ranks. Only SIGINT raises then: a SIGTERM may follow the death of another rank, and
            this one must live on until the watch has named it.
    """

    def __init__(self, *, echoes: bool = False, ranks: bool = False) -> None:
        self.signal: int | None = None
        self.patient, self.echoes, self.ranks = False, echoes, ranks
        self._when = 0.0

    def __enter__(self) -> StopRequest:
        names = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last does not exist on Windows
        numbers = [number for name in names if (number := getattr(signal, name, None))]
        # what the parent had this process ignore, as a script's shell does with Ctrl-C for background jobs, stays so
        heeded = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
        self._previous = {number: signal.signal(number, self._handle) for number in heeded}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def ignore(self) -> None:
        """Ignore all further signals: the process is about to end, and must do so in order."""
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
