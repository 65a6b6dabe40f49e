"""The processes that train one model together, one rank each, and their messages.

`torchrun` starts the ranks and numbers them by environment variables. A process that was started otherwise is the only
rank, and all methods return at once. Every rank must call the same methods in the same order.
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
from . import flight
from .stop import STOPPED_BY_USER
from .watch import Watch

_T = TypeVar("_T")
RANKS_DIFFER = 5  # exit code
_MEETING = datetime.timedelta(minutes=10)
_FOREVER = datetime.timedelta(days=7)  # the watch decides when a rank has waited too long
_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


class LostContactError(Exception):
    """The ranks can no longer talk to each other."""


class RanksDifferError(Exception):
    """Weights differ between ranks."""


@contextlib.contextmanager
def _contact() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torch has no separate type for the errors of communication
        if is_out_of_memory(error) or is_cuda_error(error):  # a fault of this rank's device
            raise
        raise LostContactError(_first_line(error)) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _roll_call(store: dist.Store, rank: int, world: int) -> str:
    """Agree on a prefix for all keys in `store` that no earlier start of these ranks has used.

    torchrun's store outlives the ranks: after a restart it still holds the addresses of dead processes. So

        1. each rank writes a random token, its "hello";
        2. rank 0 writes the "roll": its own token, which becomes the prefix, and all hellos, again and again;
        3. each other rank waits for a roll with its own token, and answers "here" under the prefix;
        4. rank 0 returns when all have answered.

    A hello left by a dead process makes a roll in which the new process does not find itself; the next roll has it.
    """
    token = os.urandom(8).hex()
    store.set(f"fastbegan/hello {rank}", token)
    deadline = time.monotonic() + _MEETING.total_seconds()
    while time.monotonic() < deadline:
        if rank == 0:
            hellos = [f"fastbegan/hello {other}" for other in range(world)]
            if store.check(hellos):
                store.set("fastbegan/roll", json.dumps([token, *(hello.decode() for hello in store.multi_get(hellos))]))
                if store.check([f"fastbegan/{token}/here {other}" for other in range(1, world)]):
                    return token
        elif store.check(["fastbegan/roll"]):
            prefix, *tokens = json.loads(store.get("fastbegan/roll"))
            if len(tokens) == world and tokens[rank] == token:
                store.set(f"fastbegan/{prefix}/here {rank}", "")
                return prefix
        time.sleep(0.05)
    raise RuntimeError(f"they did not come within {_MEETING.total_seconds():g} seconds")


class Flight:
    """A sum over ranks that has begun."""

    def __init__(self, work: Any) -> None:
        self._work = work

    def land(self) -> None:
        """Make work that is queued on the device from now on wait for the sum. Raises LostContactError."""
        with _contact():
            self._work.wait()


class Ranks:
    """All ranks, as seen by one of them.

    Methods that send or receive raise LostContactError.

    Args:
        rank: Number of this rank, from 0.
        world: Number of ranks.
        local: Number of this rank on its machine, from 0; also that of its GPU.
    """

    def __init__(self, rank: int = 0, world: int = 1, local: int = 0) -> None:
        self.rank, self.world, self.local = rank, world, local
        self.launched = "RANK" in os.environ  # by torchrun, which forwards signals and restarts failed ranks
        self.watch: Watch | None = None
        self._settled = False

    @classmethod
    def join(cls, timeout: float) -> Ranks:
        """Meet the other ranks, if torchrun started this process as one of several.

        Args:
            timeout: Seconds for which a rank may keep the others waiting before the run ends (see `watch`).

        Returns:
            The ranks; a single one if torchrun did not start this process.

        Raises:
            UserError: Environment variables are missing, or the ranks did not meet within ten minutes.
        """
        if "RANK" not in os.environ:
            return cls()
        if missing := [name for name in _VARIABLES if name not in os.environ]:
            raise UserError(f"RANK is set and {missing[0]} is not; start ranks with torchrun, which sets both")
        rank, world, local = (int(os.environ[name]) for name in _VARIABLES[:3])
        if world == 1:
            return cls()
        # torch would abort healthy ranks without a cause; `watch` ends them with one
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        flight.switch_on()
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
        """Whether this rank prints and writes files for all."""
        return self.rank == 0

    @property
    def alone(self) -> bool:
        return self.world == 1

    def leave(self) -> None:
        """This rank needs the others no longer. It may still call `end`."""
        if self.watch is not None:
            self.watch.close()  # without destroy_process_group, in which NCCL may wait for dead ranks

    def end(self, message: str, code: int) -> int:
        """End the run on all ranks with one `message`. Returns the exit code, that of the first rank to call this."""
        if self.watch is None:
            return code
        code = self.watch.end(message, code)
        self.watch.close()  # a thread that still uses the store while Python ends would abort the process
        return code

    def end_by(self, error: BaseException) -> int:
        """End the run on all ranks because of `error`; print the trace of an unexpected one. Returns the exit code."""
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
        """End this process without Python's own exit, in which torch's threads, if some still run, would abort it."""
        assert self.watch is not None
        self.watch.exit(code)

    def begin_step(self, number: int) -> None:
        """Tell the watch that step `number` begins, for which the others need this rank."""
        if self.watch is not None:
            self.watch.begin(number)

    def settle(self) -> None:
        """Tell the watch that steps take their usual time from now on."""
        self._settled = True
        if self.watch is not None:
            self.watch.settle(True)

    @contextlib.contextmanager
    def patient(self, needed: bool = True) -> Iterator[None]:
        """Allow this rank, inside and where `needed`, to keep the others waiting as long as a rank that starts."""
        if needed and self.watch is not None:
            self.watch.settle(False)
        yield
        if self.watch is not None:
            self.watch.settle(self._settled)

    def tick(self) -> None:
        """Tell the watch that this rank is about to wait for the others."""
        if self.watch is not None:
            self.watch.tick()

    def begin_sum(self, values: Tensor) -> Flight:
        """Begin to sum `values` over all ranks, in place; `land` waits for it."""
        self.tick()
        with _contact():
            return Flight(dist.all_reduce(values, async_op=True))

    def gather(self, value: _T) -> list[_T]:
        """The values of all ranks, in their order. `value` must be small and picklable."""
        if self.alone:
            return [value]
        values: list[Any] = [None] * self.world
        with _contact():
            dist.all_gather_object(values, value)
        return values

    def agree(self, value: bool) -> bool:
        """Whether `value` is true on all ranks."""
        self.tick()
        return all(self.gather(value))

    def from_first(self, value: _T) -> _T:
        """The value of rank 0, which must be small and picklable."""
        if self.alone:
            return value
        holder = [value]
        with _contact():
            dist.broadcast_object_list(holder)
        return holder[0]

    def bytes_from_first(self, data: bytes) -> bytes:
        """The `data` of rank 0, of any length."""
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
        """Raises UserError, on all ranks, if one has another value than rank 0."""
        first, *others = self.gather(value)
        for rank, other in enumerate(others, 1):
            if not same(other, first):
                raise UserError(f"{what} of rank {rank} is {other!r}, of rank 0 {first!r}; accepted: the same")

    def require_equal(self, fingerprint: Callable[[], int], when: str, folder: Path) -> None:
        """Raises RanksDifferError, on all ranks, if one has another fingerprint of its weights than rank 0."""
        if self.alone:
            return
        self.tick()
        fingerprints = self.gather(fingerprint())
        if different := [str(rank) for rank, value in enumerate(fingerprints) if value != fingerprints[0]]:
            raise RanksDifferError(
                f"{when}: the weights of rank {', '.join(different)} are no longer those of rank 0; nothing was saved "
                f"of this, go on from the last checkpoint: fastbegan train --out {folder}"
            )
