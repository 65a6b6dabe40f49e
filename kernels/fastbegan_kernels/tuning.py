"""Which form of a kernel runs on this machine: verified there first, then the fastest.

The first time a layer of a shape is met on a GPU, outside graph capture, the candidates run on random data; those that
differ from the reference are dropped with a warning, and the fastest of the others is kept (`cache`), under everything
that could change the answer: GPU, driver, torch, triton, the kernels' source, torch's flags. What was never run on this
kind of machine is tried in a child process before (`child`), since an illegal access would take this process with it.
Kernels without a matrix product are verified once, and not timed. With deterministic algorithms asked for, nothing is
measured: the algebraic tier runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cache, child
from .cache import cache_file, environment  # noqa: F401  # where users look for them
from .child import NoChildError, Trial
from .faults import in_short, is_cuda_error, is_of_the_kernel, is_out_of_memory
from .problems import Layer, Pointwise, dtype_named, excess

Problem = Layer | Pointwise
Asked = tuple[torch.device, Problem, str]
_chosen: dict[Asked, str] = {}  # the last of the key: a tier, and torch's flags
_adopted: dict[str, str] = {}
_passing: set[Asked] = set()  # choices that another process might make otherwise
_lock = threading.RLock()  # autograd has a thread for each device
_warned: set[str] = set()
_observed: dict[Asked, None] | None = None
_on_trial: Callable[[], None] | None = None
_no_child: set[int] = set()  # processes that could not have one
_UNTRIED = "could not be tried in a process of its own"


@dataclass(frozen=True)
class Outcome:
    """What became of one form of a problem: `fault` is None where it is right, `seconds` None where not measured.

    A verdict is `lasting` where another try would end the same: the form killed its process, broke the device, or gave
    wrong values. Want of memory, of time or of a compiler is none.
    """

    how: str
    fault: str | None
    seconds: float | None = None
    lasting: bool = True


def layer(problem: Layer, device: torch.device, impl: str) -> str:
    """The form for a layer (see `tiers`). `impl` is "auto", "algebraic" or "fused", which takes the best tile.

    Raises RuntimeError where "fused" is asked for and no tile of it computes this layer rightly.
    """
    if impl == "auto" and torch.are_deterministic_algorithms_enabled():
        impl = "algebraic"
    if (how := _chosen.get((device, problem, _asked(impl)))) is not None:
        return how
    if device.type == "cuda":
        how = _first_met(problem, device, impl)
    else:
        how = next(iter(forms(problem, device, impl)), "plain") if impl == "fused" else "plain"
    if impl == "fused" and how == "plain" and not (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        raise RuntimeError(f"impl 'fused' has no kernel for {problem.name} that is right on {device} (use 'algebraic')")
    return how


def pointwise(op: str, dtype: torch.dtype, device: torch.device, impl: str) -> bool:
    """Whether a kernel of `problems.POINTWISE` runs: it was right on this machine, or "fused" was asked for."""
    if impl == "fused" or device.type != "cuda":
        return impl == "fused"
    problem = Pointwise(op, str(dtype).removeprefix("torch."))
    if (how := _chosen.get((device, problem, _asked("auto")))) is None:
        how = _first_met(problem, device, "auto")
    return how == "fused"


def _first_met(problem: Problem, device: torch.device, impl: str) -> str:
    """The form for a problem that this process meets for the first time; never raises into somebody's forward."""
    if _observed is not None and impl != "fused":
        _observed[device, problem, impl] = None
        return "plain"
    try:
        if torch.cuda.is_current_stream_capturing():
            _warn(f"{problem.name} was first met during graph capture: it runs in its plain form; run it once before")
            return "plain"
        with _lock:
            return choose(problem, device, forms(problem, device, impl), impl)
    except Exception as error:
        _warn(f"{problem.name}: nothing could be chosen ({in_short(error)}); the plain form runs")
        _chosen[device, problem, _asked(impl)] = "plain"
        _passing.add((device, problem, _asked(impl)))
        return "plain"


@contextlib.contextmanager
def observed() -> Iterator[dict[Asked, None]]:
    """Inside, plain forms run where nothing was chosen yet, nothing is tried, and what was asked for is noted."""
    global _observed
    before, _observed = _observed, {}
    try:
        yield _observed
    finally:
        _observed = before


def prepare(asked: Sequence[Asked], say: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Choose for problems that `observed` noted; returns for how many of them it is not for good.

    `say` is told how many new kernels were tried, and of how many. The child that tried them ends.
    """
    global _on_trial
    done, new = 0, _new_variants(asked)

    def tell() -> None:
        nonlocal done
        done += 1
        say(min(done, new), new)

    before, _on_trial = _on_trial, tell
    try:
        for device, problem, impl in asked:
            if (device, problem, _asked(impl)) not in _chosen:
                _first_met(problem, device, impl)
    finally:
        _on_trial = before
        child.close()  # its context holds memory
    return sum((device, problem, _asked(impl)) in _passing for device, problem, impl in asked)


def _new_variants(asked: Sequence[Asked]) -> int:
    """How many kernels were never run on this kind of machine."""
    new: set[str] = set()
    with contextlib.suppress(Exception):  # it is for a line of progress only
        kept = {device: cache.read(device) for device in {device for device, _, _ in asked}}
        for device, problem, impl in asked:
            if f"{problem!r} {_asked(impl)}" not in kept[device]["choices"] | _adopted:
                new |= {problem.variant(how) for how in forms(problem, device, impl)} - kept[device]["passed"].keys()
    return len(new)


def give_up_search() -> None:
    """Turn cuDNN's search off; what was chosen under it stays chosen."""
    before = list(_chosen.items())
    searched = {impl: _asked(impl) for impl in ("auto", "algebraic", "fused")}
    torch.backends.cudnn.benchmark = False
    renamed = {searched[impl]: _asked(impl) for impl in searched}
    for (device, problem, asked), how in before:
        _chosen.setdefault((device, problem, renamed.get(asked, asked)), how)


def _asked(impl: str) -> str:
    """What a choice is for: a tier, under the flags of torch that change what its library does."""
    search = " cudnn-search" if torch.backends.cudnn.benchmark else ""
    fixed = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    return f"{impl}{search}{' deterministic' if fixed else ''}"


def forms(problem: Problem, device: torch.device, impl: str) -> list[str]:
    """What there is to choose from, besides "plain"."""
    if isinstance(problem, Pointwise):
        return ["fused"]
    tiles = [] if impl == "algebraic" else _tiles(problem, device)
    if torch.are_deterministic_algorithms_enabled():
        tiles = tiles[:1]  # which is fastest may differ between two measurements
    return tiles if impl == "fused" else ["algebraic", *tiles]


def choose(problem: Problem, device: torch.device, hows: Sequence[str], impl: str) -> str:
    """The fastest right form of `hows`, from the cache or measured; "plain" where none is right."""
    how = _kept(problem, device, impl)
    if how not in (*hows, "plain"):
        how, lasting = _fastest(problem, device, hows)
        if lasting:
            _keep(device, "choices", {f"{problem!r} {_asked(impl)}": how})
        else:
            _passing.add((device, problem, _asked(impl)))
    _chosen[device, problem, _asked(impl)] = how
    return how


def _kept(problem: Problem, device: torch.device, impl: str) -> Any:
    key = f"{problem!r} {_asked(impl)}"
    return _adopted.get(key) or cache.read(device)["choices"].get(key)


def _keep(device: torch.device, section: str, entries: dict[str, Any]) -> None:
    if (reason := cache.write(device, section, entries)) is not None:
        _warn(f"choices of kernels cannot be kept for the next process: {reason}")


def choices(device: torch.device, *, lasting: bool = False) -> dict[str, Any]:
    """What was chosen in this process for a device, for other ranks or, where `lasting`, to keep with a run."""
    device = _numbered(device)
    chosen = {
        f"{problem!r} {asked}": how
        for (d, problem, asked), how in _chosen.items()
        if d == device and not (lasting and (d, problem, asked) in _passing)
    }
    return {"environment": environment(device), "choices": chosen}


def adopt(device: torch.device, found: dict[str, Any]) -> None:
    """Take what `choices` gave elsewhere instead of measuring; nothing on another kind of machine."""
    if found.get("environment") == environment(_numbered(device)) and isinstance(found.get("choices"), dict):
        _adopted.update(found["choices"])
        _chosen.clear()


def _numbered(device: torch.device) -> torch.device:
    """Tensors say cuda:0 where users say cuda."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fastest(problem: Problem, device: torch.device, hows: Sequence[str]) -> tuple[str, bool]:
    """Of those that are right, and whether that is for good; warns of the others."""
    try:
        tried = outcomes(problem, device, hows)
    except Exception as error:  # the user's forward goes on whatever happens here
        _warn(f"{problem.name}: nothing could be tried ({in_short(error)}); the plain form runs")
        return "plain", False
    for outcome in tried:
        if outcome.fault and outcome.lasting:
            _warn(f"{problem.name}: {outcome.how} {outcome.fault} on this machine and is not used")
        elif outcome.fault not in (None, _UNTRIED):  # once for each cause, not for each kernel
            _warn(
                f"kernels are not used for now, as one {outcome.fault}; plain forms run, the next process tries again"
            )
    right = [outcome for outcome in tried if outcome.fault is None]
    lasting = all(outcome.lasting for outcome in tried)
    return min(right, key=lambda outcome: outcome.seconds or 0.0).how if right else "plain", lasting


def outcomes(problem: Problem, device: torch.device, hows: Sequence[str], *, again: bool = False) -> list[Outcome]:
    """Each form tried, checked and, where more than one is right, timed; `again`: whatever was found before."""
    trials = survivors(problem, device, hows, again=again)
    own, exact = problem.expected(device) if any(trial.fault is None for trial in trials.values()) else ([], [])
    found = {}
    for how in hows:
        trial = trials[how]
        found[how] = (
            _checked(problem, device, how, own, exact)
            if trial.fault is None
            else Outcome(how, trial.fault, lasting=trial.lasting)
        )
    right = [how for how in hows if found[how].fault is None]
    if isinstance(problem, Layer) and (len(right) > 1 or (again and right)):
        try:
            given = problem.tensors(device)
            took = measure({how: functools.partial(problem.run, how, given) for how in right}, device)
            found |= {how: Outcome(how, None, took[how]) for how in right}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _warn(f"{problem.name}: not enough memory to measure; it runs unmeasured")
            found |= {how: Outcome(how, None, lasting=False) for how in right}
    return list(found.values())


def _checked(problem: Problem, device: torch.device, how: str, own: list[Tensor], exact: list[Tensor]) -> Outcome:
    """A form run in this process, and held to what is right."""
    try:
        got, again = problem.results(how, device), problem.results(how, device)
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome(how, f"had not enough memory ({in_short(error)})", lasting=False)
        if is_cuda_error(error):  # in this process: nothing will run any more
            raise
        return Outcome(how, f"failed ({in_short(error)})", lasting=is_of_the_kernel(error))
    tf32 = isinstance(problem, Layer) and problem.tf32
    if len(got) != len(exact) or any(excess(*three, tf32=tf32) > 1 for three in zip(got, own, exact, strict=True)):
        return Outcome(how, "gave wrong values")
    # our own kernels add in a fixed order; the library's may not, in either form
    if how != "algebraic" and not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
        return Outcome(how, "gave other values the second time")
    return Outcome(how, None)


def measure(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int = 7) -> dict[str, float]:
    """Median seconds of each, in turns, after a warm-up."""
    times: dict[str, list[float]] = {how: [] for how in runs}
    for number in range(rounds + 2):
        for how, run in runs.items():
            took = _seconds(run, device)
            if number >= 2:
                times[how].append(took)
    return {how: statistics.median(found) for how, found in times.items()}


def _seconds(run: Callable[[], object], device: torch.device, calls: int = 5) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        torch.cuda._sleep(2_000_000)  # about a millisecond in which the host gets ahead: its time is not the kernels'
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def survivors(problem: Problem, device: torch.device, hows: Sequence[str], *, again: bool = False) -> dict[str, Trial]:
    """What is known of running each form in this process; those that are new (or `again`, all) are tried in a child.

    Only what ran, and what another try would find the same, is remembered.
    """
    way = os.environ.get(child.VARIABLE)
    passed = {} if again else cache.read(device)["passed"]
    verdicts = {
        how: Trial(None) if passed[problem.variant(how)] else Trial("failed or crashed in a trial")
        for how in hows
        if problem.variant(how) in passed
    }
    if way == "inside":
        return {how: verdicts.get(how, Trial(None)) for how in hows}
    new = [how for how in hows if how not in verdicts]
    if new and way != "child" and os.getpid() not in _no_child:  # a trial does not begin trials
        try:
            tried = child.tried(problem, device, new, _on_trial)
        except NoChildError as error:
            _no_child.add(os.getpid())
            _warn(
                f"kernels cannot be tried in a process of their own: {error}; plain forms run. {child.VARIABLE}=inside "
                "tries them in this one, which a kernel that crashes takes with it"
            )
        else:
            kept = {problem.variant(how): one.fault is None for how, one in tried.items() if one.lasting}
            _keep(device, "passed", kept)
            verdicts |= tried
    unknown = Trial(_UNTRIED, lasting=False)
    return {how: verdicts.get(how, unknown) for how in hows}


def _tiles(problem: Layer, device: torch.device) -> list[str]:
    """Names of the fused kernels' tiles for a layer on a device."""
    if problem.kind == "down_end" or (problem.backward and problem.kind == "down" and problem.weight[2] != 3):
        return []
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return []  # no asynchronous copies, and Triton does not support these GPUs
    from .fused import launch

    found = launch.layer_tiles(
        problem.x, problem.weight, problem.kind, dtype_named(problem.dtype), device, backward=problem.backward
    )
    return [tile.name for tile in found]


def _warn(message: str) -> None:
    """Once a process and message."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fastbegan_kernels: {message}", RuntimeWarning, stacklevel=2)
