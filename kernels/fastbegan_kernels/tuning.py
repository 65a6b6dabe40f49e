"""Chooses the form of a kernel on this machine: verified there first, then the fastest.

A problem (`problems`) names its forms, checks them and runs them; this module knows no op. The choice comes with the
first call of a shape on a GPU, outside graph capture:

1. Forms that never ran on this kind of machine run in a child process (`child`): an illegal access kills its process.
2. Every form runs on random data. Those that differ from float64 by too much are dropped with a warning.
3. The fastest of the others (`clock`) is kept (`cache`). Its key is everything that could change the answer: GPU,
   driver, torch, triton, the kernels' source and torch's flags.

Kernels without a matrix product are verified once and not timed. Under torch.use_deterministic_algorithms nothing is
timed: the algebraic tier runs.
"""

from __future__ import annotations

import contextlib
import functools
import os
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cache, child, clock
from .cache import cache_file, environment  # noqa: F401  # part of this module's interface
from .child import NoChildError, Trial
from .clock import Timing
from .faults import in_short, is_cuda_error, is_of_the_kernel, is_out_of_memory
from .problems import FUSED, NAMES, Form, Pointwise, Problem, Tensors, excess

Asked = tuple[torch.device, Problem, str]
_chosen: dict[Asked, Form] = {}  # the key ends with a tier and torch's flags (`_tier`)
_adopted: dict[str, str] = {}
_passing: set[Asked] = set()  # choices that a passing fault influenced: they are not cached
_lock = threading.RLock()  # autograd has a thread for each device
_warned: set[str] = set()
_observed: dict[Asked, None] | None = None
_on_trial: Callable[[], None] | None = None
_no_child: set[int] = set()  # ids of processes in which no child could start
_UNTRIED = "could not be tried in a process of its own"


@dataclass(frozen=True)
class Outcome:
    """The verdict on one `form` of a problem.

    `fault` is None where the form is right, `timing` None where it was not measured. `lasting` means that another try
    would end the same: the form killed its process, broke the device, or gave wrong values. Want of memory, of time or
    of a compiler does not last.
    """

    form: Form
    fault: str | None
    timing: Timing | None = None
    lasting: bool = True

    @property
    def seconds(self) -> float:
        """The median time, 0 where it was not measured."""
        return self.timing.seconds if self.timing else 0.0


def form(problem: Problem, device: torch.device, impl: str) -> Form:
    """The form for a problem. `impl` is "auto", "algebraic" or "fused", which takes the best of our kernels.

    Raises RuntimeError where "fused" is forced and no kernel computes this rightly.
    """
    if impl == "auto" and torch.are_deterministic_algorithms_enabled():
        impl = "algebraic"
    if (chosen := _chosen.get((device, problem, _tier(impl)))) is None:
        if device.type == "cuda":
            chosen = _first_met(problem, device, impl)
        else:
            chosen = next(iter(problem.forms(device, impl)), problem.plain) if impl == "fused" else problem.plain
            _chosen[device, problem, _tier(impl)] = chosen
    if impl == "fused" and chosen == problem.plain and not _is_capturing(device):
        raise RuntimeError(f"impl 'fused' has no kernel for {problem.name} that is right on {device} (use 'algebraic')")
    return chosen


def is_fused(op: str, dtype: torch.dtype, device: torch.device, impl: str) -> bool:
    """Whether the kernel of `problems.POINTWISE` runs: it is verified on this machine, or "fused" is forced."""
    if impl == "fused" or device.type != "cuda":
        return impl == "fused"
    return dtype in NAMES and form(Pointwise(op, NAMES[dtype]), device, "auto") == FUSED


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _first_met(problem: Problem, device: torch.device, impl: str) -> Form:
    """The form for a problem that is new to this process. Never raises: a user's forward calls it."""
    try:
        candidates = problem.forms(device, impl)
        if _observed is not None and impl != "fused":
            if candidates:
                _observed[device, problem, impl] = None
            return problem.plain
        if not candidates:
            return _chosen.setdefault((device, problem, _tier(impl)), problem.plain)
        if torch.cuda.is_current_stream_capturing():
            _warn(f"{problem.name} was first met during graph capture: it runs in its plain form; run it once before")
            return problem.plain
        with _lock:
            return choose(problem, device, candidates, impl)
    except Exception as error:
        _warn(f"{problem.name}: nothing could be chosen ({in_short(error)}); the plain form runs")
        _chosen[device, problem, _tier(impl)] = problem.plain
        _passing.add((device, problem, _tier(impl)))
        return problem.plain


@contextlib.contextmanager
def observed() -> Iterator[dict[Asked, None]]:
    """Collect the problems that are met inside. New ones run in their plain form, and no kernel is tried."""
    global _observed
    before, _observed = _observed, {}
    try:
        yield _observed
    finally:
        _observed = before


def prepare(asked: Sequence[Asked], say: Callable[[int, int], None] = lambda done, total: None) -> int:
    """Choose for the problems that `observed` collected. Returns how many of the choices do not last.

    `say` gets the number of new kernels tried so far, and their total. The child process ends afterwards.
    """
    global _on_trial
    done, new = 0, _new_variants(asked)

    def count_one() -> None:
        nonlocal done
        done += 1
        say(min(done, new), new)

    before, _on_trial = _on_trial, count_one
    try:
        for device, problem, impl in asked:
            if (device, problem, _tier(impl)) not in _chosen:
                _first_met(problem, device, impl)
    finally:
        _on_trial = before
        child.close()  # it holds device memory
    return sum((device, problem, _tier(impl)) in _passing for device, problem, impl in asked)


def _new_variants(asked: Sequence[Asked]) -> int:
    """The number of kernels that never ran on this kind of machine."""
    new: set[str] = set()
    with contextlib.suppress(Exception):  # only a progress bar needs it
        known = {device: cache.read(device) for device in {device for device, _, _ in asked}}
        for device, problem, impl in asked:
            if problem.tried_apart and _key(problem, impl) not in known[device]["choices"] | _adopted:
                variants = {problem.variant(form) for form in problem.forms(device, impl)}
                new |= variants - known[device]["passed"].keys()
    return len(new)


def give_up_search() -> None:
    """Turn cuDNN's search off. Choices made under the search stay valid."""
    chosen = list(_chosen.items())
    searched = {impl: _tier(impl) for impl in ("auto", "algebraic", "fused")}
    torch.backends.cudnn.benchmark = False
    renamed = {searched[impl]: _tier(impl) for impl in searched}
    for (device, problem, tier), form in chosen:
        _chosen.setdefault((device, problem, renamed.get(tier, tier)), form)


def _tier(impl: str) -> str:
    """A tier with the flags of torch that change what its library does."""
    search = " cudnn-search" if torch.backends.cudnn.benchmark else ""
    fixed = torch.are_deterministic_algorithms_enabled() or torch.backends.cudnn.deterministic
    return f"{impl}{search}{' deterministic' if fixed else ''}"


def _key(problem: Problem, impl: str) -> str:
    """The key of a choice in kernels.json."""
    return f"{problem!r} {_tier(impl)}"


def choose(problem: Problem, device: torch.device, candidates: Sequence[Form], impl: str) -> Form:
    """The fastest right candidate, from the cache or measured; the plain form where none is right."""
    name = _known(problem, device, impl)
    chosen = next((form for form in (*candidates, problem.plain) if form.name == name), None)
    if chosen is None:
        chosen, lasting = _fastest(problem, device, candidates, impl)
        if lasting:
            _keep(device, "choices", {_key(problem, impl): chosen.name})
        else:
            _passing.add((device, problem, _tier(impl)))
    _chosen[device, problem, _tier(impl)] = chosen
    return chosen


def _known(problem: Problem, device: torch.device, impl: str) -> Any:
    """A choice adopted from another rank or read from the cache; None where there is none."""
    key = _key(problem, impl)
    return _adopted.get(key) or cache.read(device)["choices"].get(key)


def _keep(device: torch.device, section: str, entries: dict[str, Any]) -> None:
    if (reason := cache.write(device, section, entries)) is not None:
        _warn(f"choices of kernels cannot be kept for the next process: {reason}")


def choices(device: torch.device, *, lasting: bool = False) -> dict[str, Any]:
    """The choices of this process for a device, for `adopt`: on other ranks or, with `lasting`, in a later run."""
    device = _numbered(device)
    chosen = {
        f"{problem!r} {tier}": form.name
        for (d, problem, tier), form in _chosen.items()
        if d == device and not (lasting and (d, problem, tier) in _passing)
    }
    return {"environment": environment(device), "choices": chosen}


def adopt(device: torch.device, sent: dict[str, Any]) -> None:
    """Use the choices that `choices` returned in another process, and measure nothing for them.

    Choices from a different environment (GPU, driver, versions) are ignored.
    """
    if sent.get("environment") == environment(_numbered(device)) and isinstance(sent.get("choices"), dict):
        _adopted.update(sent["choices"])
        _chosen.clear()


def _numbered(device: torch.device) -> torch.device:
    """The device with its index: users write cuda, tensors are on cuda:0."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


def _fastest(problem: Problem, device: torch.device, candidates: Sequence[Form], impl: str) -> tuple[Form, bool]:
    """The fastest of the right candidates, and whether the choice lasts. Warns about the others."""
    try:
        verdicts = outcomes(problem, device, candidates)
    except Exception as error:  # a user's forward must go on
        _warn(f"{problem.name}: nothing could be tried ({in_short(error)}); the plain form runs")
        return problem.plain, False
    for outcome in verdicts:
        if outcome.fault and outcome.lasting:
            _warn(f"{problem.name}: {outcome.form.name} {outcome.fault} on this machine and is not used")
        elif outcome.fault not in (None, _UNTRIED):  # without names: one warning for each cause
            _warn(
                f"kernels are not used for now, as one {outcome.fault}; plain forms run, the next process tries again"
            )
    right = [outcome for outcome in verdicts if outcome.fault is None]
    lasting = all(outcome.lasting for outcome in verdicts)
    if timed := {outcome.form.name: outcome.timing for outcome in right if outcome.timing is not None}:
        times = {name: [timing.seconds, timing.spread] for name, timing in timed.items()}
        _keep(device, "times", {_key(problem, impl): times})
    return min(right, key=lambda outcome: outcome.seconds).form if right else problem.plain, lasting


def outcomes(
    problem: Problem, device: torch.device, candidates: Sequence[Form], *, again: bool = False
) -> list[Outcome]:
    """Each candidate tried, checked and, where more than one is right, timed. `again` ignores earlier verdicts."""
    trials = survivors(problem, device, candidates, again=again)
    plain, exact = problem.expected(device) if any(trial.fault is None for trial in trials.values()) else ([], [])
    verdicts = {}
    for form in candidates:
        trial = trials[form]
        if trial.fault is None:
            verdicts[form] = _checked(problem, device, form, plain, exact)
        else:
            verdicts[form] = Outcome(form, trial.fault, lasting=trial.lasting)
    right = [form for form in candidates if verdicts[form].fault is None]
    if problem.timed and (len(right) > 1 or (again and right)):
        try:
            sets = clock.rotating(problem.tensors(device), device)
            timings = clock.measure({form: functools.partial(_call, problem, form, sets) for form in right}, device)
            verdicts |= {form: Outcome(form, None, timings[form]) for form in right}
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            _warn(f"{problem.name}: not enough memory to measure; it runs unmeasured")
            verdicts |= {form: Outcome(form, None, lasting=False) for form in right}
    return list(verdicts.values())


def _call(problem: Problem, form: Form, sets: list[Tensors], number: int) -> object:
    return problem.run(form, sets[number % len(sets)])


def _checked(problem: Problem, device: torch.device, form: Form, plain: list[Tensor], exact: list[Tensor]) -> Outcome:
    """The verdict on a form that runs in this process: right values, and the same ones twice."""
    try:
        got, again = problem.results(form, device), problem.results(form, device)
    except Exception as error:
        if is_out_of_memory(error):
            return Outcome(form, f"had not enough memory ({in_short(error)})", lasting=False)
        if is_cuda_error(error):  # this process cannot run kernels any more
            raise
        return Outcome(form, f"failed ({in_short(error)})", lasting=is_of_the_kernel(error))
    triples = zip(got, plain, exact, strict=True)
    if len(got) != len(exact) or any(excess(*three, tf32=problem.tf32) > 1 for three in triples):
        return Outcome(form, "gave wrong values")
    if problem.repeats(form) and not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
        return Outcome(form, "gave other values the second time")
    return Outcome(form, None)


def survivors(
    problem: Problem, device: torch.device, candidates: Sequence[Form], *, again: bool = False
) -> dict[Form, Trial]:
    """Whether each candidate runs without harm. New ones (with `again`, all) are tried in a child process.

    The cache keeps forms that ran, and faults that last.
    """
    if not problem.tried_apart:
        return dict.fromkeys(candidates, Trial(None))
    mode = os.environ.get(child.VARIABLE)
    passed = {} if again else cache.read(device)["passed"]
    verdicts = {
        form: Trial(None) if passed[problem.variant(form)] else Trial("failed or crashed in a trial")
        for form in candidates
        if problem.variant(form) in passed
    }
    if mode == "inside":
        return {form: verdicts.get(form, Trial(None)) for form in candidates}
    new = [form for form in candidates if form not in verdicts]
    if new and mode != "child" and os.getpid() not in _no_child:  # a child starts no children
        try:
            trials = child.tried(problem, device, new, _on_trial)
        except NoChildError as error:
            _no_child.add(os.getpid())
            _warn(
                f"kernels cannot be tried in a process of their own: {error}; plain forms run. {child.VARIABLE}=inside "
                "tries them in this one, which a kernel that crashes takes with it"
            )
        else:
            lasting = {problem.variant(form): trial.fault is None for form, trial in trials.items() if trial.lasting}
            _keep(device, "passed", lasting)
            verdicts |= trials
    unknown = Trial(_UNTRIED, lasting=False)
    return {form: verdicts.get(form, unknown) for form in candidates}


def _warn(message: str) -> None:
    """Warn once in a process for each message."""
    if message not in _warned:
        _warned.add(message)
        warnings.warn(f"fastbegan_kernels: {message}", RuntimeWarning, stacklevel=2)
