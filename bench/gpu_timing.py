"""Times on the device: interleaved medians of captured graphs over more inputs than the L2 cache holds, and facts."""

from __future__ import annotations

import itertools
import math
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from unittest import mock

import torch
from torch import Tensor

from bench.gpu_candidates import Candidate, Judge, candidates, differentiable, inputs, packed, results
from bench.gpu_cases import DEVICE, DRY, DTYPES, ON_CPU, Case, Outcome, named
from bench.poison import poisoned
from fastbegan_kernels import tuning
from fastbegan_kernels.cache import cudnn_version
from fastbegan_kernels.child import Trial

Run = Callable[[int], object]  # one call on the inputs of this number
_CPU_TURN = 8e-3  # seconds that a turn takes at least; shorter ones say more of the machine than of the op


def wait() -> None:
    """Until the device is done; raises where its context is lost."""
    if not ON_CPU:
        torch.cuda.synchronize()


def facts(_: Case) -> Outcome:
    """The device and its ceilings: copy bandwidth in bytes read and written a second, matrix rates in FLOP/s."""
    import triton

    known: Outcome = {"status": "right", "device": "cpu (dry run)", "torch": torch.__version__}
    known |= {"triton": triton.__version__, "python": sys.version.split()[0], "l2_bytes": _l2()}
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        known |= {"device": properties.name, "capability": 10 * properties.major + properties.minor}
        known |= {"processors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        known |= {"cuda": torch.version.cuda, "cudnn": cudnn_version()}
    known["copy_bytes_per_s"] = _copy_rate(1 << (18 if DRY else 31))
    known["copy_256_mib_bytes_per_s"] = _copy_rate(1 << (18 if DRY else 28))
    size = 64 if DRY else 8192
    known["flop_per_s"] = rates = {}
    for mode, dtype in DTYPES.items():
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        rates[mode] = 2 * size**3 / _measure({"": lambda _, a=a, b=b: a @ b}, 1)[""]["ms"] * 1e3
    return known


def _copy_rate(size: int) -> float:
    source = torch.randn(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / _measure({"copy": lambda _: target.copy_(source)}, 1)["copy"]["ms"] * 1e3


def _l2() -> int:
    if ON_CPU:
        return 1 << (20 if DRY else 25)
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 26)


def capture(run: Run, sets: int) -> tuple[Callable[[], object], Outcome]:
    """Several calls over rotating inputs as one replay, and what is known of a call so far; raises where none runs."""

    def loop(count: int) -> None:
        for number in range(count):
            run(number % sets)

    if DRY:
        return partial(loop, 1), {"calls": 1, "graph": False}
    loop(3 if ON_CPU else max(3, sets))
    wait()
    start = time.perf_counter()
    loop(5)
    wait()
    direct = (time.perf_counter() - start) / 5  # with the host's share
    if ON_CPU:
        calls = math.ceil(_CPU_TURN / direct)
        return in_turns(run, sets, calls), {"calls": calls}
    # enough calls a replay that the events' own microseconds do not count
    repeat = min(64, max(sets, math.ceil(1e-3 / direct)))
    known: Outcome = {"direct_us": direct * 1e6, "calls": repeat, "graph": False}
    plain = partial(loop, repeat)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            plain()
    except Exception as error:
        wait()
        return plain, known | {"capture": named(error)}
    return graph.replay, known | {"graph": True}


def in_turns(run: Run, sets: int, calls: int) -> Callable[[], None]:
    """Several calls a turn, which goes on with the inputs where the last one ended."""
    starts = itertools.count(0, calls)

    def turn() -> None:
        first = next(starts)
        for number in range(first, first + calls):
            run(number % sets)

    return turn


def _try_capture(run: Run, sets: int) -> tuple[Callable[[], object] | None, Outcome]:
    try:
        return capture(run, sets)
    except Exception as error:
        wait()
        return None, {"error": named(error)}


def _measure(runs: dict[str, Run], sets: int, seconds: float = 0.25) -> dict[str, Outcome]:
    """Median milliseconds a call of each candidate, turn by turn; {"error": ...} where one cannot run."""
    captured = {name: _try_capture(run, sets) for name, run in runs.items()}
    ready = {name: replay for name, (replay, _) in captured.items() if replay is not None}

    def once() -> dict[str, float]:
        marks = {name: _stopwatch(replay) for name, replay in ready.items()}
        wait()
        return {name: read() / captured[name][1]["calls"] for name, read in marks.items()}

    rounds = 1
    if not DRY:
        once()
        start = time.perf_counter()
        once()
        rounds = min(40, max(9, int(seconds / (time.perf_counter() - start))))
    times = [once() for _ in range(rounds)]
    for name in ready:
        values = sorted(row[name] for row in times)
        spread = [values[int(share * (rounds - 1))] for share in (0.2, 0.8)]
        captured[name][1].update({"ms": statistics.median(values), "p20_p80": spread, "rounds": rounds})
    return {name: known for name, (_, known) in captured.items()}


def _stopwatch(run: Callable[[], object]) -> Callable[[], float]:
    """Run, and return what will tell its milliseconds once the device is done."""
    if DRY:
        start = time.perf_counter()
        run()
        took = 1e3 * (time.perf_counter() - start)
        return lambda: took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    return lambda: begin.elapsed_time(end)


def rotation(case: Case) -> tuple[list[list[Tensor]], int]:
    """Inputs in as many sets as are worth their memory, and the bytes that one set reads."""
    first = inputs(case)
    pictures = case.op == "normalize_images"
    moved = first[0][: case.shape[0]].nbytes if pictures else sum(value.nbytes for value in first)
    sets = 2 if DRY else min(32, math.ceil(1.5 * _l2() / moved))
    given = [first, *(inputs(replace(case, seed=seed)) for seed in range(1, sets))]
    if pictures:  # one set of images, other picks
        given = [[first[0], *others[1:]] for others in given]
    return given, moved


def timing(case: Case) -> Outcome:
    """Forward, and forward + backward where there is one, of all candidates that are right at this shape."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    given, moved = rotation(case)
    outcome: Outcome = {"status": "timed", "sets": len(given), "input_bytes": moved, "dropped": {}}
    # forgets what earlier cases chose, which stays on disk
    tuning.adopt(DEVICE, {"environment": tuning.environment(DEVICE), "choices": {}})
    # this process may die: that every kernel is tried in a child of its own before is the part `tuning`'s to check
    trusted = mock.patch.object(
        tuning, "survivors", lambda problem, device, hows, **_: dict.fromkeys(hows, Trial(None))
    )
    with trusted, warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for backward in (False, True) if differentiable(case) else (False,):
            outcome["both" if backward else "forward"] = _direction(case, given, backward, outcome["dropped"])
    outcome["warnings"] = [str(one.message) for one in told if "fastbegan_kernels" in str(one.message)]
    chosen = tuning.choices(DEVICE)["choices"].items()
    outcome["chosen"] = {key.removesuffix(" auto"): how for key, how in chosen if key.endswith(" auto")}
    if not DRY:
        torch.cuda.empty_cache()
    return outcome


def _direction(case: Case, given: list[list[Tensor]], backward: bool, dropped: dict[str, str]) -> dict[str, Outcome]:
    """Times by candidate; those that are not right are left out, and told of in `dropped`."""
    return _measure(contenders(case, given, backward, dropped), len(given))


def contenders(case: Case, given: list[list[Tensor]], backward: bool, dropped: dict[str, str]) -> dict[str, Run]:
    """What can be timed, by name; those that are not right are left out, and told of in `dropped`."""
    folded = [packed(case, one) for one in given]
    for value in itertools.chain.from_iterable(one[: differentiable(case)] for one in (*given, *folded)):
        value.requires_grad_(backward)
    every = candidates(case)
    eager = every["eager"]
    grads = [torch.randn_like(value) for value in results(eager, given[0], None)] if backward else None
    judge = Judge(case, eager, given[0], grads)
    runs: dict[str, Run] = {}
    for name, candidate in every.items():
        if backward and candidate.forward_only:
            continue
        mine = folded if candidate.packed else given
        why = "" if candidate is eager else _tried(judge, candidate, mine[0], grads)
        if why:
            dropped[f"{name} {'both' if backward else 'forward'}"] = why
        else:
            runs[name] = lambda number, one=candidate, mine=mine: results(one, mine[number], grads)
    return runs


def _tried(judge: Judge, candidate: Candidate, given: list[Tensor], grads: list[Tensor] | None) -> str:
    """Why a candidate cannot be timed, "" where it can."""
    try:
        with poisoned():
            found = results(candidate, given, grads)
        return judge.fault(candidate, found)
    except Exception as error:
        wait()
        return named(error)
