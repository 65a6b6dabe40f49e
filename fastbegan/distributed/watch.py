"""Watches over all ranks: if one dies or hangs, all end within a minute or two, and the message names it.

A thread of each rank writes a beat into the ranks' store once a second. The beat holds a serial number and the count
of the rank's meetings with the others (`ticks`). A rank whose number stays the same is dead. If the lowest count of
ticks does not rise for `patience` seconds, the ranks that hold it are blamed. States of a rank, as its beat gives them:

    starting --settle()--> settled --close()--> closed
        |  <--settle(False)--  |
        +--wait_for_a_name()---+--> lost

    starting  allowed to keep the others waiting for 10 x patience: kernels compile
    settled   allowed to keep them waiting for 1 x patience
    closed    finished in order: its silence is no fault
    lost      torch reported an error of communication: waits until a verdict names the rank that caused it

Rank 0 judges all ranks. Every other rank judges rank 0, and only whether it is alive. The first verdict goes into the
store as `ended`. All ranks exit with its code: LOST (4), or the code that a rank passed to `end`. A rank that gets no
answer from the store exits with LOST by itself.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NoReturn

from torch.distributed import PrefixStore, TCPStore

from ..files import printable

LOST = 4  # exit code of a run that lost a rank
_BEAT = 1.0  # seconds
_SILENCE = 20.0  # seconds without a beat after which a rank counts as dead; under torchrun's 30 until it kills
_SILENCE_AFTER_LOSS = 6.0  # the same once a rank has lost contact, when one of them is dead already
_GIVE_UP = 20.0  # seconds after a loss of contact in which a dead rank must show
_WARM_UP = 10  # factor on the patience in the first steps, which compile
_LINGER = 3.0  # seconds for the others to read the verdict: the store may end with this process


@dataclass(frozen=True)
class Beat:
    """The state of a rank, written by itself once a second."""

    number: int
    ticks: int
    settled: bool
    closed: bool
    lost: str
    """The error of communication in state lost; else empty."""


class Judge:
    """Decides from the beats which rank is dead or hangs. `patience` is in seconds."""

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.patience, self.clock = patience, clock
        self._numbers: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._fewest, self._fewest_since, self._lost_since = 0, clock(), math.inf

    def look(self, beats: dict[int, Beat], *, all_ranks: bool) -> tuple[list[int], str] | None:
        """Ranks to blame and the reason, or None while all is well. The list is empty if no rank can be named.

        `all_ranks` says that `beats` has all ranks, so that ticks can be compared.
        """
        now = self.clock()
        for rank, beat in beats.items():
            if self._numbers.get(rank) != beat.number or beat.closed:
                self._numbers[rank], self._heard[rank] = beat.number, now
        lost = [f"; rank {rank}: {beat.lost}" for rank, beat in beats.items() if beat.lost]
        self._lost_since = min(self._lost_since, now) if lost else math.inf
        silence = _SILENCE_AFTER_LOSS if lost else _SILENCE
        if silent := self._silent(now, silence):
            return silent, f"no sign of life for {silence:g} seconds"
        if now - self._lost_since > _GIVE_UP:
            return [], "the ranks lost contact" + "".join(lost)
        fewest = min(beat.ticks for beat in beats.values())
        if fewest != self._fewest or not any(beat.ticks for beat in beats.values()):
            self._fewest, self._fewest_since = fewest, now
        patience = self.patience * (1 if all(beat.settled for beat in beats.values()) else _WARM_UP)
        if all_ranks and now - self._fewest_since > patience:
            if silent := self._silent(now, _SILENCE_AFTER_LOSS):
                return silent, f"kept the others waiting for {patience:g} seconds, without a sign of life"
            behind = [rank for rank, beat in beats.items() if beat.ticks == fewest]
            if len(behind) < len(beats):
                return behind, f"kept the others waiting for {patience:g} seconds"
            return [], f"no rank got on for {patience:g} seconds"
        return None

    def _silent(self, now: float, seconds: float) -> list[int]:
        return [rank for rank, heard in self._heard.items() if now - heard > seconds]


class Watch:
    """The watch of one rank: two threads that write its beats and read the others'.

    The rank calls `tick` before each wait for the others, and `end` to end the run.
    """

    def __init__(self, address: str, port: int, prefix: str, rank: int, world: int, patience: float) -> None:
        """`address` and `port` are those of the ranks' store; `prefix` separates this start from earlier ones."""
        wait = datetime.timedelta(seconds=_SILENCE)
        self._store = PrefixStore(prefix, TCPStore(address, port, is_master=False, timeout=wait))
        self._place = f"{address}:{port}"
        self.rank, self.world = rank, world
        self._judge = Judge(patience)
        self._ticks, self._step, self._settled, self._lost = 0, 0, False, ""
        self._begun = self._answered = time.monotonic()
        self._all_seen, self._printed, self._ending = False, False, -math.inf
        self.last_wish: Callable[[int], object] | None = None  # called with the exit code before the process ends
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._store.set(f"host {rank}", socket.gethostname())
        self._beat(0)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._run, self._guard_store)]
        for thread in self._threads:
            thread.start()

    def begin(self, step: int) -> None:
        """This rank begins a step, for which the others need it."""
        self._step = step
        self.tick()

    def tick(self) -> None:
        """This rank is about to meet the others once more."""
        self._ticks += 1

    def settle(self, settled: bool = True) -> None:
        """Steps take their usual time from now on: normal patience. False: ten times as much."""
        self._settled = settled

    def close(self) -> None:
        """This rank finishes in order: stop the threads."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def wait_for_a_name(self, reason: str) -> NoReturn:
        """Contact was lost because of `reason`. Wait for the verdict that names a rank, which ends this process."""
        self._lost = reason
        while True:
            time.sleep(1)

    def end(self, message: str, code: int) -> int:
        """End all ranks; print `message` unless another rank was first. Returns the exit code of the first."""
        with self._lock:
            self._ending = time.monotonic()
            verdict = f"{self.rank} {code}"
            with contextlib.suppress(RuntimeError):  # without the store, this rank ends alone
                verdict = self._store.compare_set("ended", "", verdict).decode()
            rank, code = map(int, verdict.split())
            if rank == self.rank and not self._printed:  # both threads may come here
                self._printed = True
                print(f"error: {printable(message)}", file=sys.stderr, flush=True)
                time.sleep(_LINGER)
        return code

    def _beat(self, number: int) -> None:
        beat = Beat(number, self._ticks, self._settled, self._closed.is_set(), self._lost)
        self._store.set(f"beat {self.rank}", json.dumps(vars(beat)))

    def _run(self) -> None:
        """Write this rank's beats and judge the others'."""
        for number in itertools.count(1):
            closed = self._closed.wait(_BEAT)
            try:
                self._beat(number)  # once more after `close`, which tells the others
                if closed:
                    return
                if time.monotonic() - self._ending < 2 * _GIVE_UP:
                    continue  # this rank is ending the run in another thread, and may need time to print and save
                if self._store.check(["ended"]):
                    self._leave(int(self._store.get("ended").split()[1]))
                verdict = self._judge_beats()
            except RuntimeError as error:
                if closed:
                    return
                reason = str(error).strip().partition("\n")[0]
                verdict = f"rank 0 or its machine is gone: the store at {self._place} does not answer ({reason})"
            if verdict:
                self._leave(self.end(verdict, LOST))
            self._answered = time.monotonic()

    def _judge_beats(self) -> str | None:
        ranks = range(self.world) if self.rank == 0 else (0,)
        if not self._all_seen:
            missing = [rank for rank in ranks if not self._store.check([f"beat {rank}"])]
            if missing and time.monotonic() - self._begun > _SILENCE:
                return f"rank {', '.join(map(str, missing))}: no sign of life for {_SILENCE:g} seconds, from the first"
            if missing:
                return None
            self._all_seen = True
        texts = self._store.multi_get([f"beat {rank}" for rank in ranks])
        beats = {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}
        blame = self._judge.look(beats, all_ranks=self.rank == 0)
        if blame is None:
            return None
        culprits, reason = blame
        names = ", ".join(f"rank {rank} (on {self._store.get(f'host {rank}').decode()})" for rank in culprits)
        return f"{names}: {reason}, at step {self._step:,}" if names else f"{reason}, at step {self._step:,}"

    def _guard_store(self) -> None:
        """End this process if a call of the store neither answers nor fails, so that `_run` hangs in it."""
        while not self._closed.wait(_BEAT):
            if time.monotonic() - self._answered > 2 * _SILENCE:
                what = f"no answer from {self._place} for {2 * _SILENCE:g} seconds: rank 0's machine or the network"
                print(f"error: rank {self.rank}: {what} is gone", file=sys.stderr, flush=True)
                self._leave(LOST)

    def exit(self, code: int) -> NoReturn:
        """Call `last_wish` and end this process at once: other threads may be waiting for a dead rank."""
        if self.last_wish is not None:
            with contextlib.suppress(Exception):
                self.last_wish(code)
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)

    def _leave(self, code: int) -> NoReturn:
        if self.rank == 0:
            time.sleep(_LINGER)  # the store may be in this process, and the others still read it
        self.exit(code)
