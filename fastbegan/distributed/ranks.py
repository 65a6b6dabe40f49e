"""The processes that train one model together, a rank each: who they are and what they tell each other.

`torchrun` starts them and says by environment variables who is who. A process that it did not start is alone: then all
of this does nothing. Every rank calls the same methods in the same order.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import operator
import os
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from fastbegan_kernels.faults import is_cuda_error, is_out_of_memory

from ..errors import UserError
from .stop import STOPPED_BY_USER
from .watch import Watch

_T = TypeVar("_T")
RANKS_DIFFER = 5  # exit code
_MEETING = datetime.timedelta(minutes=10)
_FOREVER = datetime.timedelta(days=7)  # who waits too long for whom is for the watch to judge
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LostContactError(Exception):
    """The ranks can no longer talk to each other."""


class RanksDifferError(Exception):
    """What must be equal on all ranks is not."""


@contextlib.contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no type of its own for what back ends raise
        if is_out_of_memory(error) or is_cuda_error(error):  # of this rank's device, not of the others
            raise
        raise LostContactError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _roll_call(store: dist.Store, rank: int, world: int) -> str:
    """A name that only these processes have, for what they write into `store`.

    torchrun's store outlives ranks that it starts again, and keeps the addresses of those before. Each rank says hello
    with a number of its own; rank 0 answers with all of them and the name, until all have found their own number in it.
    """
    mine = os.urandom(8).hex()
    store.set(f"fastbegan/hello {rank}", mine)
    until = time.monotonic() + _MEETING.total_seconds()
    while time.monotonic() < until:
        if rank == 0:
            hellos = [f"fastbegan/hello {one}" for one in range(world)]
            if store.check(hellos):
                store.set("fastbegan/roll", json.dumps([mine, *(hello.decode() for hello in store.multi_get(hellos))]))
                if store.check([f"fastbegan/{mine}/here {one}" for one in range(1, world)]):
                    return mine
        elif store.check(["fastbegan/roll"]):
            name, *present = json.loads(store.get("fastbegan/roll"))
            if len(present) == world and present[rank] == mine:
                store.set(f"fastbegan/{name}/here {rank}", "")
                return name
        time.sleep(0.05)
    raise RuntimeError(f"they did not come within {_MEETING.total_seconds():g} seconds")


class Flight:
    """Values on their way between ranks."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def land(self) -> None:
        """They are there, for the work that is queued on the device from now on. Raises LostContactError."""
        with _contact():
            self._work.wait()


class Ranks:
    """All ranks as one of them sees them: it is `rank` of `world`, and the `local`-th on its machine.

    Methods that talk to the others raise LostContactError.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0) -> None:
        self.rank, self.world, self.local = rank, world, local
        self.launched = "RANK" in os.environ  # by torchrun, which passes signals on and starts again what fails
        self.watch: Watch | None = None
        self._settled = False

    @classmethod
    def join(cls, timeout: float) -> Ranks:
        """Meet the others, if torchrun started this process with others; raises UserError where that fails.

        A rank that keeps the others waiting for `timeout` seconds ends the run: see `watch`.
        """
        if "RANK" not in os.environ:
            return cls()
        if missing := [name for name in _VARIABLES if name not in os.environ]:
            raise UserError(f"RANK is set and {missing[0]} is not; start ranks with torchrun, which sets both")
        rank, world, local = (int(os.environ[name]) for name in _VARIABLES[:3])
        if world == 1:
            return cls()
        # torch would abort healthy ranks at once; `watch` ends them, and says why
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        hosts = rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() and dist.is_nccl_available() else "gloo"
        try:
            store = dist.TCPStore(*place, is_master=hosts, timeout=_MEETING, wait_for_workers=False)
            prefix = f"fastbegan/{_roll_call(store, rank, world)}"
            dist.init_process_group(
                backend, store=dist.PrefixStore(prefix, store), rank=rank, world_size=world, timeout=_FOREVER
            )
            store.set_timeout(_FOREVER)  # the first sum on GPUs waits here for rank 0, which may still compile
        except (RuntimeError, ValueError) as error:
            raise UserError(f"rank {rank} of {world} cannot meet the others: {_first_line(error)}") from None
        ranks = cls(rank, world, local)
        ranks.watch = Watch(*place, prefix, rank, world, timeout)
        return ranks

    @property
    def first(self) -> bool:
        """Whether this one speaks and writes for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    def leave(self) -> None:
        """This rank needs the others no more; it may still `end` what is left of the run."""
        if self.watch is not None:
            self.watch.close()  # groups end with the process: NCCL may wait for who is gone when it ends one

    def end(self, message: str, code: int) -> int:
        """Before a rank ends a run that the others would go on with: all end with `message`; returns the exit code."""
        if self.watch is None:
            return code
        code = self.watch.end(message, code)
        self.watch.close()  # a thread that talks while Python ends would abort the process
        return code

    def end_by(self, error: BaseException) -> int:
        """End the run of all because of `error`, with its trace where nobody expects it; returns the exit code."""
        if isinstance(error, LostContactError):
            assert self.watch is not None
            self.watch.wait_for_a_name(str(error))
        if isinstance(error, RanksDifferError):
            return self.end(str(error), RANKS_DIFFER)
        if isinstance(error, UserError | OSError):
            return self.end(str(error), 2)
        if isinstance(error, KeyboardInterrupt):
            return self.end("interrupted", STOPPED_BY_USER)
        traceback.print_exception(error)
        return self.end(f"rank {self.rank} ended: {type(error).__name__} {error}".rstrip(), 1)

    def exit(self, code: int) -> NoReturn:
        """End this process, without the end of Python: torch's threads, where some still run, would abort it there."""
        assert self.watch is not None
        self.watch.exit(code)

    def begin_step(self, number: int) -> None:
        """A step begins, of which the others will need this rank's part."""
        if self.watch is not None:
            self.watch.begin(number)

    def settle(self) -> None:
        """Steps take their usual time from now on."""
        self._settled = True
        if self.watch is not None:
            self.watch.settle(True)

    @contextlib.contextmanager
    def patient(self, needed: bool = True) -> Iterator[None]:
        """Inside, where `needed`, this rank may keep the others waiting as long as one that starts."""
        if needed and self.watch is not None:
            self.watch.settle(False)
        yield
        if self.watch is not None:
            self.watch.settle(self._settled)

    def tick(self) -> None:
        """This rank is about to wait for the others."""
        if self.watch is not None:
            self.watch.tick()

    def begin_sum(self, values: Tensor) -> Flight:
        """Begin to sum `values` over all ranks, in place."""
        self.tick()
        with _contact():
            return Flight(dist.all_reduce(values, async_op=True))

    def gather(self, value: _T) -> list[_T]:
        """Every rank's value, in their order: something small that can be pickled."""
        if self.alone:
            return [value]
        found: list[Any] = [None] * self.world
        with _contact():
            dist.all_gather_object(found, value)
        return found

    def agree(self, value: bool) -> bool:
        """Whether `value` is true on all ranks."""
        self.tick()
        return all(self.gather(value))

    def from_first(self, value: _T) -> _T:
        """Rank 0's value: something small that can be pickled."""
        if self.alone:
            return value
        holder = [value]
        with _contact():
            dist.broadcast_object_list(holder)
        return holder[0]

    def bytes_from_first(self, data: bytes) -> bytes:
        """Rank 0's `data`, of any length."""
        if self.alone:
            return data
        if not (length := self.from_first(len(data))):
            return b""
        empty = torch.empty(length, dtype=torch.uint8)
        values = torch.frombuffer(bytearray(data), dtype=torch.uint8) if self.first else empty
        with _contact():
            dist.broadcast(values, 0)
        return values.numpy().tobytes()

    def require_same(self, what: str, value: _T, same: Callable[[_T, _T], bool] = operator.eq) -> None:
        """Raises UserError, on all ranks, where some have another value than rank 0."""
        values = self.gather(value)
        for rank, one in enumerate(values):
            if not same(one, values[0]):
                raise UserError(f"{what} of rank {rank} is {one!r}, of rank 0 {values[0]!r}; accepted: the same")

    def require_equal(self, fingerprint: Callable[[], int], when: str, folder: Path) -> None:
        """Raises RanksDifferError, on all ranks, where one has another fingerprint of its weights than rank 0."""
        if self.alone:
            return
        self.tick()
        found = self.gather(fingerprint())
        if others := [str(rank) for rank, one in enumerate(found) if one != found[0]]:
            raise RanksDifferError(
                f"{when}: the weights of rank {', '.join(others)} are no longer those of rank 0; nothing was saved of "
                f"this, go on from the last checkpoint: fastbegan train --out {folder}"
            )
