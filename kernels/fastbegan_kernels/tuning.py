"""Which form of a kernel runs on this machine: verified there first, then the fastest.

The first time a layer of a shape is met on a GPU, outside graph capture, the candidates run on random data; those that
differ from the reference are dropped with a warning, and the fastest of the others is kept, in memory and on disk under
everything that could change the answer (GPU, driver, torch, triton, the kernels' source). What was never run on this
kind of machine is tried in a child process before, since an illegal access would take this process with it. Kernels
without a matrix product are verified once, and not timed. With deterministic algorithms asked for, nothing is measured:
the algebraic tier runs.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .dispatch import HAS_TRITON
from .problems import Layer, Pointwise, dtype_named, excess

Problem = Layer | Pointwise
_SECONDS = 120.0  # a child that takes longer hangs
_CHILD = "FASTBEGAN_TRIAL"  # set in the environment of children
_UNTRIED = "could not be tried in a process of its own"
_chosen: dict[tuple[torch.device, Problem, str], str] = {}
_adopted: dict[str, str] = {}
_warned: set[str] = set()


@dataclass(frozen=True)
class Outcome:
    """What became of one form of a problem: `fault` is None where it is right, `seconds` None where not measured.

    A verdict is `lasting` where another try would end the same: no want of memory, of a process, of time.
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
    if (how := _chosen.get((device, problem, impl))) is not None:
        return how
    hows = forms(problem, device, impl)
    if impl == "fused" and not hows:
        raise RuntimeError(f"impl 'fused' has no kernel for {problem.name} on {device} (use 'algebraic')")
    if device.type != "cuda":
        return hows[0] if impl == "fused" else "plain"
    if torch.cuda.is_current_stream_capturing():
        _warn(f"{problem.name} was first met during graph capture: it runs in its plain form; run it once before")
        return "plain"
    return choose(problem, device, hows, impl)


def pointwise(op: str, dtype: torch.dtype, device: torch.device, impl: str) -> bool:
    """Whether a kernel of `problems.POINTWISE` runs: it was right on this machine, or "fused" was asked for."""
    if impl == "fused" or device.type != "cuda":
        return impl == "fused"
    problem = Pointwise(op, str(dtype).removeprefix("torch."))
    if (how := _chosen.get((device, problem, "auto"))) is not None:
        return how == "fused"
    if torch.cuda.is_current_stream_capturing():
        _warn(f"{op} was first met during graph capture: it runs in its plain form; run it once before")
        return False
    return choose(problem, device, forms(problem, device, "auto"), "auto") == "fused"


def forms(problem: Problem, device: torch.device, impl: str) -> list[str]:
    """What there is to choose from, besides "plain"."""
    if isinstance(problem, Pointwise):
        return ["fused"]
    tiles = [] if impl == "algebraic" else _tiles(problem, device)
    if torch.are_deterministic_algorithms_enabled():
        tiles = tiles[:1]  # which is fastest may differ between two measurements
    return tiles if impl == "fused" else ["algebraic", *tiles]


def choose(problem: Problem, device: torch.device, hows: Sequence[str], impl: str) -> str:
    """The fastest right form of `hows`, from the cache or measured; "plain" where none is right.

    Raises RuntimeError instead where `impl` is "fused".
    """
    key = f"{problem!r} {impl}"
    how = _adopted.get(key) or _read(device)["choices"].get(key)
    if how not in (*hows, "plain"):
        how, lasting = _fastest(problem, device, hows)
        if lasting:
            _write(device, "choices", {key: how})
    if impl == "fused" and how == "plain":
        raise RuntimeError(f"impl 'fused': no kernel for {problem.name} was right on {device} (use 'algebraic')")
    _chosen[device, problem, impl] = how
    return how


def choices(device: torch.device) -> dict[str, Any]:
    """What was chosen in this process for a device, to be kept with a run or sent to other ranks."""
    device = _numbered(device)
    found = {f"{problem!r} {impl}": how for (d, problem, impl), how in _chosen.items() if d == device}
    return {"environment": environment(device), "choices": found}


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
        found = outcomes(problem, device, hows)
    except Exception as error:  # the user's forward goes on whatever happens here
        _warn(f"{problem.name}: nothing could be tried ({_short(error)}); the plain form runs")
        return "plain", False
    for outcome in found:
        if outcome.fault:
            _warn(f"{problem.name}: {outcome.how} {outcome.fault} on this machine and is not used")
    right = [outcome for outcome in found if outcome.fault is None]
    lasting = all(outcome.lasting for outcome in found)
    return min(right, key=lambda outcome: outcome.seconds or 0.0).how if right else "plain", lasting


def outcomes(
    problem: Problem, device: torch.device, hows: Sequence[str], *, always_measure: bool = False
) -> list[Outcome]:
    """Each form tried, checked and, where more than one is right (or `always_measure`), timed."""
    trials = survivors(problem, device, hows)
    own, exact = problem.expected(device) if None in trials.values() else ([], [])
    found = {}
    for how in hows:
        fault = trials[how]
        try:
            fault = _fault(problem, device, how, own, exact) if fault is None else fault
            found[how] = Outcome(how, fault, lasting=fault != _UNTRIED)
        except torch.OutOfMemoryError:
            found[how] = Outcome(how, "had not enough memory to be checked", lasting=False)
    right = [how for how in hows if found[how].fault is None]
    if isinstance(problem, Layer) and (len(right) > 1 or always_measure):
        try:
            given = problem.tensors(device)
            took = measure({how: functools.partial(problem.run, how, given) for how in right}, device)
            found |= {how: Outcome(how, None, took[how]) for how in right}
        except torch.OutOfMemoryError:
            _warn(f"{problem.name}: not enough memory to measure; it runs unmeasured")
            found |= {how: Outcome(how, None, lasting=False) for how in right}
    return list(found.values())


def _fault(
    problem: Problem, device: torch.device, how: str, own: list[Tensor], exact: list[Tensor]
) -> str | None:  # fmt: skip
    """What is wrong with a form, None where nothing is. Raises OutOfMemoryError."""
    try:
        got, again = problem.results(how, device), problem.results(how, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that gives up is a kernel that does not run
        return f"failed ({_short(error)})"
    tf32 = isinstance(problem, Layer) and problem.tf32
    if len(got) != len(exact) or any(excess(*three, tf32=tf32) > 1 for three in zip(got, own, exact, strict=True)):
        return "gave wrong values"
    # our own kernels add in a fixed order; the library's may not, in either form
    if how != "algebraic" and not all(torch.equal(a, b) for a, b in zip(got, again, strict=True)):
        return "gave other values the second time"
    return None


def _short(error: Exception) -> str:
    return " ".join(f"{type(error).__name__}: {error}".split())[:200]


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


def survivors(problem: Problem, device: torch.device, hows: Sequence[str]) -> dict[str, str | None]:
    """Why each form may not be run in this process, None where it may: it ran on this kind of machine before.

    The new ones are tried in child processes. Only what ran, and what killed its child, is remembered.
    """
    passed: dict[str, bool] = _read(device)["passed"]
    verdicts = {how: passed.get(problem.variant(how)) for how in hows}
    starved: set[str] = set()
    while new := [how for how in hows if verdicts[how] is None and how not in starved]:
        told = _try_in_child(problem, device, new)
        found = dict.fromkeys(told["ran"], True) | dict.fromkeys(told["broken"], False)
        _write(device, "passed", {problem.variant(how): verdict for how, verdict in found.items()})
        verdicts |= found
        starved.update(told["starved"])
        if not any(told.values()):  # no child, no device, no time: nothing is known, so nothing is trusted
            break
    faults = {True: None, False: "failed or crashed in a trial", None: _UNTRIED}
    return {how: faults[verdicts[how]] for how in hows}


def _try_in_child(problem: Problem, device: torch.device, hows: Sequence[str]) -> dict[str, list[str]]:
    """Forms that "ran" in one child, that are "broken" (the last may have killed it), that were "starved" of memory."""
    told: dict[str, list[str]] = {"ran": [], "broken": [], "starved": []}
    if os.environ.get(_CHILD):  # a trial does not begin trials, nor does a frozen program that was started as one
        return told
    task = {"type": type(problem).__name__, "problem": asdict(problem), "hows": list(hows), "device": str(device)}
    environment = {name: value for name, value in os.environ.items() if name != "FASTBEGAN_IMPL"} | {_CHILD: "1"}
    packages = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
    timed_out = False
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "fastbegan_kernels.trial", json.dumps(task), str(log)]
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        try:
            subprocess.run(command, env=environment, timeout=_SECONDS, check=False, **quiet)
        except (subprocess.TimeoutExpired, OSError):
            timed_out = True  # may have been compiling: no verdict
        lines = log.read_text().splitlines() if log.exists() else []
    begun: list[str] = []
    for line in lines:
        word, _, how = line.partition(" ")
        told.get(word, begun if word == "begin" else []).append(how)
    if begun and not timed_out and not any(begun[-1] in hows for hows in told.values()):
        told["broken"].append(begun[-1])
    return told


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


def cache_file() -> Path:
    """kernels.json in FASTBEGAN_CACHE, else in fastbegan/ of the user's cache folder."""
    if chosen := os.environ.get("FASTBEGAN_CACHE"):
        return Path(chosen) / "kernels.json"
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fastbegan" / "kernels.json"


@functools.cache
def environment(device: torch.device) -> str:
    """What choices depend on besides the problem."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        source.update(path.read_bytes())
    facts = [f"torch {torch.__version__}", f"kernels {source.hexdigest()[:16]}"]
    names = ("triton", "pytorch-triton", "triton-windows")
    found = [distribution.version for name in names for distribution in importlib.metadata.distributions(name=name)]
    facts.append(f"triton {found[0] if found else 'unknown'}" if HAS_TRITON else "no triton")
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        facts += [torch.cuda.get_device_name(device), f"sm_{major}{minor}", f"cuda {torch.version.cuda}"]
        facts += [f"driver {_driver()}", f"cudnn {torch.backends.cudnn.version()}"]
    return ", ".join([device.type, *facts])


def _driver() -> str:
    """The kernel module's version where it tells, else the CUDA version that the driver offers."""
    try:
        return Path("/proc/driver/nvidia/version").read_text().split("Kernel Module")[1].split()[0]
    except (OSError, IndexError):
        return str(torch._C._cuda_getDriverVersion())  # pyright: ignore[reportAttributeAccessIssue]


def _file() -> dict[str, Any]:
    """What is on disk, for all environments; nothing where it cannot be read."""
    try:
        found = json.loads(cache_file().read_text())
    except (OSError, ValueError, RuntimeError):  # the last where there is no home folder
        return {}
    return found if isinstance(found, dict) else {}


def _read(device: torch.device) -> dict[str, dict[str, Any]]:
    found = _file().get(environment(device))
    kept = found if isinstance(found, dict) else {}
    return {name: value if isinstance(value := kept.get(name), dict) else {} for name in ("choices", "passed")}


def _write(device: torch.device, section: str, entries: dict[str, Any]) -> None:
    """Add entries; a machine whose cache cannot be written measures again next time, so may two that write at once."""
    here = _read(device)
    here[section].update(entries)
    try:
        path = cache_file()
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".kernels.")
        with os.fdopen(handle, "w") as file:
            json.dump({**_file(), environment(device): here}, file, indent=1)
        Path(name).replace(path)
    except (OSError, RuntimeError) as error:
        _warn(f"choices of kernels cannot be kept: {_short(error)}")
