"""Which form of a kernel runs on this machine: verified there first, then the fastest.

The first time a layer of a shape is met on a GPU, outside graph capture, the candidates run on random data; those that
differ from the reference are dropped with a warning, and the fastest of the others is kept, in memory and on disk under
everything that could change the answer (GPU, driver, torch, triton, the kernels' source). What was never run on this
kind of machine is tried in a child process before, since an illegal access would take this process with it. Kernels
without a matrix product are verified once, and not timed. With deterministic algorithms asked for, nothing is measured:
the algebraic tier runs.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .problems import Layer, Pointwise, dtype_named, excess

Problem = Layer | Pointwise
_SECONDS = 120.0  # a child that takes longer hangs
_chosen: dict[tuple[torch.device, Problem, bool], str] = {}
_warned: set[str] = set()


def layer(problem: Layer, device: torch.device, impl: str) -> str:
    """The form for a layer (see `tiers`). `impl` is "auto", "algebraic" or "fused", which takes the best tile.

    Raises RuntimeError where "fused" is asked for and no tile of it computes this layer rightly.
    """
    fused = impl == "fused"
    if (how := _chosen.get((device, problem, fused))) is not None:
        return how
    if impl == "algebraic":
        return "algebraic" if device.type == "cuda" else "plain"
    hows = _tiles(problem, device)
    if fused and not hows:
        raise RuntimeError(f"impl 'fused' has no kernel for {problem.name} on {device} (use 'algebraic')")
    if device.type != "cuda":
        return hows[0] if fused else "plain"
    if torch.are_deterministic_algorithms_enabled():
        return hows[0] if fused else "algebraic"
    if torch.cuda.is_current_stream_capturing():
        _warn(f"{problem.name} was first met during graph capture: it runs unmeasured; run it once before")
        return hows[0] if fused else "algebraic"
    return choose(problem, device, hows if fused else ["algebraic", *hows], fused=fused)


def pointwise(op: str, dtype: torch.dtype, device: torch.device, impl: str) -> bool:
    """Whether a kernel of `problems.POINTWISE` runs: it was right on this machine, or "fused" was asked for."""
    if impl == "fused" or device.type != "cuda":
        return impl == "fused"
    problem = Pointwise(op, str(dtype).removeprefix("torch."))
    if (how := _chosen.get((device, problem, False))) is not None:
        return how == "fused"
    if torch.cuda.is_current_stream_capturing():
        _warn(f"{op} was first met during graph capture: the plain form runs; run it once before")
        return False
    return choose(problem, device, ["fused"], fused=False) == "fused"


def choose(problem: Problem, device: torch.device, hows: Sequence[str], *, fused: bool) -> str:
    """The fastest right form of `hows`, from the cache or measured; where none is, "plain", or if `fused` an error."""
    key = f"{problem!r}{' fused' if fused else ''}"
    how = _read(device)["choices"].get(key)
    if how not in (*hows, "plain"):
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
            how = _measure(problem, device, hows)
        _write(device, "choices", {key: how})
    if fused and how == "plain":
        raise RuntimeError(f"impl 'fused': no kernel for {problem.name} was right on {device} (use 'algebraic')")
    _chosen[device, problem, fused] = how
    return how


def choices(device: torch.device) -> dict[str, str]:
    """What was chosen in this process for a device, by problem: to be kept with a run, or sent to other ranks."""
    return {f"{p!r}{' fused' if f else ''}": how for (d, p, f), how in _chosen.items() if d == device}


def adopt(device: torch.device, found: dict[str, str]) -> None:
    """Take choices made elsewhere on the same kind of machine instead of measuring."""
    _write(device, "choices", found)
    _chosen.clear()


def _measure(problem: Problem, device: torch.device, hows: Sequence[str]) -> str:
    """The fastest of those that are right; "plain" where none is."""
    safe = survivors(problem, device, hows)
    right = [how for how in safe if _is_right(problem, device, how)]
    for how in hows:
        if how not in right:
            why = "gave wrong values" if how in safe else "crashed or hung in a trial"
            _warn(f"{problem.name}: {how} {why} on this machine and is not used")
    if len(right) < 2 or isinstance(problem, Pointwise):
        return right[0] if right else "plain"
    try:
        given = problem.tensors(device)
        took = measure({how: functools.partial(problem.run, how, given) for how in right}, device)
    except torch.OutOfMemoryError:
        _warn(f"{problem.name}: not enough memory to measure; it runs unmeasured")
        return right[0]
    return min(right, key=lambda how: took[how])


def _is_right(problem: Problem, device: torch.device, how: str) -> bool:
    try:
        own, exact = problem.expected(device)
        got, again = problem.results(how, device), problem.results(how, device)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a compiler that gives up is a kernel that does not run
        _warn(f"{problem.name}: {how} failed: {str(error)[:200]}")
        return False
    tf32 = isinstance(problem, Layer) and problem.tf32
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return same and all(excess(*three, tf32=tf32) <= 1 for three in zip(got, own, exact, strict=True))


def measure(runs: dict[str, Callable[[], object]], device: torch.device, rounds: int = 7) -> dict[str, float]:
    """Median seconds of each, in turns, after a warm-up."""
    times: dict[str, list[float]] = {how: [] for how in runs}
    for number in range(rounds + 2):
        for how, run in runs.items():
            took = _seconds(run, device)
            if number >= 2:
                times[how].append(took)
    return {how: statistics.median(found) for how, found in times.items()}


def _seconds(run: Callable[[], object], device: torch.device, calls: int = 3) -> float:
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.device(device):
        begin.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def survivors(problem: Problem, device: torch.device, hows: Sequence[str]) -> list[str]:
    """Those of `hows` that ran to the end on this kind of machine, now or earlier; the new ones in child processes."""
    passed: dict[str, bool] = _read(device)["passed"]
    new = [how for how in hows if problem.variant(how) not in passed]
    while new:
        ran, tried = _try_in_child(problem, device, new)
        found = {problem.variant(how): how in ran for how in tried}
        if not found:  # no child could be started: nothing is known, so nothing is trusted
            _warn(f"{problem.name}: no child process to try kernels in; the plain form runs")
            return []
        _write(device, "passed", found)
        passed = {**passed, **found}
        new = [how for how in new if how not in tried]
    return [how for how in hows if passed[problem.variant(how)]]


def _try_in_child(problem: Problem, device: torch.device, hows: Sequence[str]) -> tuple[set[str], set[str]]:
    """Run forms in one child. Returns those that ran, and those that were begun: at most one more, where it died."""
    task = {"type": type(problem).__name__, "problem": asdict(problem), "hows": list(hows), "device": str(device)}
    environment = {name: value for name, value in os.environ.items() if name != "FASTBEGAN_IMPL"}
    packages = str(Path(__file__).parent.parent)
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        command = [sys.executable, "-m", "fastbegan_kernels.tuning", json.dumps(task), str(log)]
        quiet: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        with contextlib.suppress(subprocess.TimeoutExpired, OSError):
            subprocess.run(command, env=environment, timeout=_SECONDS, check=False, **quiet)
        lines = log.read_text().splitlines() if log.exists() else []
    tried = {line.removeprefix("begin ") for line in lines if line.startswith("begin ")}
    return {line.removeprefix("ran ") for line in lines if line.startswith("ran ")}, tried


def trial(task: dict[str, Any], log: Path) -> None:
    """The child's part: run each form on the inputs of a check, and write down before and after that it did."""
    kind = {"Layer": Layer, "Pointwise": Pointwise}[task["type"]]
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in task["problem"].items()}
    problem, device = kind(**fields), torch.device(task["device"])
    if isinstance(problem, Layer):
        torch.backends.cudnn.allow_tf32 = problem.tf32
    for how in task["hows"]:
        with log.open("a") as file:
            file.write(f"begin {how}\n")
        try:
            values: list[Tensor] = problem.results(how, device)
            sum(value.float().sum() for value in values).item()  # type: ignore[union-attr]
        except Exception as error:  # what fails to compile is found out by the check that follows
            if "CUDA error" in str(error):
                raise  # the context is gone: what comes next would fail too
        with log.open("a") as file:
            file.write(f"ran {how}\n")


def _tiles(problem: Layer, device: torch.device) -> list[str]:
    """Names of the fused kernels' tiles for a layer on a device."""
    if problem.backward and problem.kind == "down" and problem.weight[2] != 3:
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
    try:
        import triton

        facts.append(f"triton {triton.__version__}")
    except ImportError:
        facts.append("no triton")
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


def _read(device: torch.device) -> dict[str, dict[str, Any]]:
    try:
        found = json.loads(cache_file().read_text())[environment(device)]
        return {"choices": dict(found["choices"]), "passed": dict(found["passed"])}
    except (OSError, ValueError, KeyError, TypeError):
        return {"choices": {}, "passed": {}}


def _write(device: torch.device, section: str, entries: dict[str, Any]) -> None:
    """Add entries; a machine whose cache cannot be written measures again next time."""
    path = cache_file()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            everything = json.loads(path.read_text())
        except (OSError, ValueError):
            everything = {}
        here = everything.setdefault(environment(device), {"choices": {}, "passed": {}})
        here[section] = {**here[section], **entries}
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=".kernels.")
        with os.fdopen(handle, "w") as file:
            json.dump(everything, file, indent=1)
        Path(name).replace(path)
    except OSError as error:
        _warn(f"choices of kernels cannot be kept in {path}: {error}")


if __name__ == "__main__":
    trial(json.loads(sys.argv[1]), Path(sys.argv[2]))
