"""Whether all ranks are alive and get on; if not, the run ends within a minute or two and says whose fault it is.

Each rank writes down once a second, in a thread of its own, how often it has come to meet the others (`ticks`). Who
writes no more is dead, or its machine is; who has the fewest ticks is the one that the others wait for. Rank 0 judges
all, the others judge rank 0. Who finds something first says it for all, and all end.
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

LOST = 4  # exit code of a run that lost a rank
_BEAT = 1.0  # seconds
_SILENCE = 20.0  # seconds without a sign of life after which a rank is taken for dead; torchrun kills after 30 ...
_SILENCE_AFTER_LOSS = 6.0  # ... and once ranks have lost contact, so that it can be said with whom
_GIVE_UP = 20.0  # seconds to find that out
_WARM_UP = 10  # times the patience, for the first steps, which compile
_LINGER = 3.0  # seconds for the others to read why it ends: the store may end with this process


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself."""

    number: int
    ticks: int
    settled: bool
    closed: bool
    lost: str
    """Why it can no longer talk to the others; empty while it can."""


class Judge:
    """Who is dead and who hangs, by what was heard of each rank and when."""

    def __init__(self, patience: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.patience, self.clock = patience, clock
        self._numbers: dict[int, int] = {}
        self._heard: dict[int, float] = {}
        self._least, self._least_since, self._lost_since = 0, clock(), math.inf

    def look(self, beats: dict[int, Beat], *, all_ranks: bool) -> tuple[list[int], str] | None:
        """Who is to blame, and for what; None while all is well. Nobody is named where contact alone was lost."""
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
        least = min(beat.ticks for beat in beats.values())
        if least != self._least or not any(beat.ticks for beat in beats.values()):
            self._least, self._least_since = least, now
        patience = self.patience * (1 if all(beat.settled for beat in beats.values()) else _WARM_UP)
        if all_ranks and now - self._least_since > patience:
            if silent := self._silent(now, _SILENCE_AFTER_LOSS):
                return silent, f"kept the others waiting for {patience:g} seconds, without a sign of life"
            behind = [rank for rank, beat in beats.items() if beat.ticks == least]
            if len(behind) < len(beats):
                return behind, f"kept the others waiting for {patience:g} seconds"
            return [], f"no rank got on for {patience:g} seconds"
        return None

    def _silent(self, now: float, seconds: float) -> list[int]:
        return [rank for rank, heard in self._heard.items() if now - heard > seconds]


class Watch:
    """A rank's eye on the others. `tick` before each wait for them; what ends a run goes through `end`."""

    def __init__(self, address: str, port: int, prefix: str, rank: int, world: int, patience: float) -> None:
        """`address` and `port` are those of the ranks' store, `prefix` tells these processes from earlier ones."""
        wait = datetime.timedelta(seconds=_SILENCE)
        self._store = PrefixStore(prefix, TCPStore(address, port, is_master=False, timeout=wait))
        self._place = f"{address}:{port}"
        self.rank, self.world = rank, world
        self._judge = Judge(patience)
        self._ticks, self._step, self._settled, self._lost = 0, 0, False, ""
        self._begun = self._answered = time.monotonic()
        self._complete, self._said, self._ending = False, False, -math.inf
        self.last_wish: Callable[[], object] | None = None  # what is done before this process is ended from here
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._store.set(f"host {rank}", socket.gethostname())
        self._say(0)
        self._threads = [threading.Thread(target=work, daemon=True) for work in (self._talk, self._time)]
        for thread in self._threads:
            thread.start()

    def begin(self, step: int) -> None:
        """This rank begins a step, of which the others need its part."""
        self._step = step
        self.tick()

    def tick(self) -> None:
        """This rank is about to do, once more, its part of something that all do."""
        self._ticks += 1

    def settle(self, settled: bool = True) -> None:
        """Steps take their usual time from now on, or for once they do not."""
        self._settled = settled

    def close(self) -> None:
        """This rank ends in peace."""
        self._closed.set()
        for thread in self._threads:
            thread.join(timeout=5)

    def wait_for_a_name(self, reason: str) -> NoReturn:
        """Contact was lost: stay until it is known with whom; that ends this process."""
        self._lost = reason
        while True:
            time.sleep(1)

    def end(self, message: str, code: int) -> int:
        """Make all ranks end; prints `message` unless another one was faster. Returns the exit code of all."""
        with self._lock:
            self._ending = time.monotonic()
            verdict = f"{self.rank} {code}"
            with contextlib.suppress(RuntimeError):  # else nobody can be told
                verdict = self._store.compare_set("ended", "", verdict).decode()
            rank, code = map(int, verdict.split())
            if rank == self.rank and not self._said:  # the other thread may come here second
                self._said = True
                print(f"error: {message}", file=sys.stderr, flush=True)
                time.sleep(_LINGER)
        return code

    def _say(self, number: int) -> None:
        beat = Beat(number, self._ticks, self._settled, self._closed.is_set(), self._lost)
        self._store.set(f"beat {self.rank}", json.dumps(vars(beat)))

    def _talk(self) -> None:
        """Say that this rank lives, and judge the others."""
        for number in itertools.count(1):
            over = self._closed.wait(_BEAT)
            try:
                self._say(number)
                if over:
                    return
                if time.monotonic() - self._ending < 2 * _GIVE_UP:
                    continue  # this process is ending the run, and may have something left to say
                if self._store.check(["ended"]):
                    self._leave(int(self._store.get("ended").split()[1]))
                found = self._look()
            except RuntimeError as error:
                if over:
                    return
                reason = str(error).strip().partition("\n")[0]
                found = f"rank 0 or its machine is gone: the store at {self._place} does not answer ({reason})"
            if found:
                self._leave(self.end(found, LOST))
            self._answered = time.monotonic()

    def _look(self) -> str | None:
        ranks = range(self.world) if self.rank == 0 else (0,)
        if not self._complete:
            missing = [rank for rank in ranks if not self._store.check([f"beat {rank}"])]
            if missing and time.monotonic() - self._begun > _SILENCE:
                return f"rank {', '.join(map(str, missing))}: no sign of life for {_SILENCE:g} seconds, from the first"
            if missing:
                return None
            self._complete = True
        texts = self._store.multi_get([f"beat {rank}" for rank in ranks])
        beats = {rank: Beat(**json.loads(text)) for rank, text in zip(ranks, texts, strict=True)}
        found = self._judge.look(beats, all_ranks=self.rank == 0)
        if found is None:
            return None
        names = [f"rank {rank} (on {self._store.get(f'host {rank}').decode()})" for rank in found[0]]
        return ": ".join([*([", ".join(names)] if names else []), found[1]]) + f", at step {self._step:,}"

    def _time(self) -> None:
        """End this process where the store does not even refuse to answer."""
        while not self._closed.wait(_BEAT):
            if time.monotonic() - self._answered > 2 * _SILENCE:
                what = f"no answer from {self._place} for {2 * _SILENCE:g} seconds: rank 0's machine or the network"
                print(f"error: rank {self.rank}: {what} is gone", file=sys.stderr, flush=True)
                self._leave(LOST)

    def exit(self, code: int) -> NoReturn:
        """End this process after its last wish; nothing of it is waited for, since it may wait for who is gone."""
        if self.last_wish is not None:
            with contextlib.suppress(Exception):
                self.last_wish()
        for stream in (sys.stdout, sys.stderr):
            with contextlib.suppress(OSError):
                stream.flush()
        os._exit(code)

    def _leave(self, code: int) -> NoReturn:
        if self.rank == 0:
            time.sleep(_LINGER)  # the store may be in this process
        self.exit(code)
