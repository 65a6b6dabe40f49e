"""Times forms of a problem on a device as a step would find them: with inputs that the cache does not hold."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import TypeVar

import torch

from .problems import Tensors

Key = TypeVar("Key", bound=Hashable)
_CALLS = 5  # of one timing
_SETS = 8  # of inputs at most; small ones come from the cache in a step too


@dataclass(frozen=True)
class Timing:
    """Median and spread of a form's rounds: the spread is the middle half of them over the median."""

    seconds: float
    spread: float


def rotating(tensors: Tensors, device: torch.device) -> list[Tensors]:
    """The inputs and copies of them, at most eight, which fill the device's cache twice where memory lasts."""
    if device.type != "cuda":
        return [tensors]
    size = sum(value.nbytes for value in tensors.values() if value is not None)
    cache = getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 1 << 26)
    free = torch.cuda.mem_get_info(device)[0]
    sets = max(1, min(_SETS, -(-2 * cache // max(1, size)), free // (4 * max(1, size))))
    copies = [
        {name: None if value is None else value.clone() for name, value in tensors.items()} for _ in range(sets - 1)
    ]
    return [tensors, *copies]


def measure(runs: dict[Key, Callable[[int], object]], device: torch.device, rounds: int = 7) -> dict[Key, Timing]:
    """Time functions of a call's number, by which they choose their inputs. They run in turns, two for warmth."""
    times: dict[Key, list[float]] = {key: [] for key in runs}
    for number in range(rounds + 2):
        for key, run in runs.items():
            seconds = _seconds(run, device, number * _CALLS)
            if number >= 2:
                times[key].append(seconds)
    return {key: _timing(measured) for key, measured in times.items()}


def _timing(measured: list[float]) -> Timing:
    low, middle, high = statistics.quantiles(measured, n=4) if len(measured) > 1 else measured * 3
    return Timing(middle, (high - low) / middle if middle else 0.0)


def _seconds(run: Callable[[int], object], device: torch.device, first: int) -> float:
    """Seconds of a call, whose numbers begin at `first`."""
    if device.type != "cuda":
        start = time.perf_counter()
        run(first)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda._sleep(2_000_000)  # about a millisecond of lead, so that launches by the host are not timed
        begin.record()
        for call in range(first, first + _CALLS):
            run(call)
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3 / _CALLS
