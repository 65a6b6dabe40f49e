"""Facts about the machine of a measurement, and its roofline, measured in the same run."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import subprocess
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastbegan_kernels.cache import cudnn_version

from ..device import cpu_info, nvidia_smi

_ROOT = Path(__file__).resolve().parents[2]


def synchronize(device: torch.device) -> None:
    """Wait for all work queued on the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def facts(device: torch.device) -> dict[str, Any]:
    """Name of the device, driver, versions, commit and date; a figure means nothing without them."""
    entries: dict[str, Any] = {"device": _name(device), "driver": None, "commit": _commit()}
    if device.type == "cuda":
        card = nvidia_smi()
        entries |= {"driver": card[1] if card else None, "cuda": torch.version.cuda}
        entries |= {"cudnn": cudnn_version()}
        entries |= {"capability": "{}.{}".format(*torch.cuda.get_device_capability(device))}
    else:
        entries |= {"threads": torch.get_num_threads(), "instructions": torch.backends.cpu.get_cpu_capability()}
    entries |= {"torch": torch.__version__, "triton": _version("triton"), "python": platform.python_version()}
    return entries | {"date": time.strftime("%Y-%m-%d")}


def slug(machine: dict[str, Any]) -> str:
    """A file name for the device of `facts`; figures compare only between machines of one name."""
    parts = [machine["device"], *(str(machine[name]) for name in ("threads", "instructions") if name in machine)]
    return re.sub(r"[^a-z0-9]+", "-", " ".join(parts).lower()).strip("-")


def _name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    names = (line.partition(":")[2].strip() for line in cpu_info() if line.startswith("model name"))
    return "CPU " + next(names, platform.machine())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Short hash of the checkout's HEAD, with a plus where tracked files were changed; None outside a checkout."""
    if not (_ROOT / ".git").exists():
        return None
    try:
        head = _git("rev-parse", "--short=10", "HEAD")
        return head + ("+" if _git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=_ROOT, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.strip()


def roofline(device: torch.device, *, quick: bool = False) -> dict[str, Any]:
    """Measure the ceilings of a device; `quick` takes smaller arrays on a CPU.

    Returns `copy_bytes_per_s`, bytes read and written by a copy, and `flop_per_s` of matrix products by precision.
    """
    gpu = device.type == "cuda"
    count = 1 << (28 if gpu else 23 if quick else 24)  # values, far more than a cache holds
    values = torch.zeros(2, count, device=device)
    pair = values.unbind()
    ceilings: dict[str, Any] = {"copy_bytes_per_s": 8 * count / _seconds(partial(torch.Tensor.copy_, *pair), device)}
    size, rates = 8192 if gpu else 768 if quick else 1536, {}
    modes = {"float32": torch.float32}
    if gpu:
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        modes |= {"tf32": torch.float32, "bf16": torch.bfloat16} if ampere else {}
        modes |= {"fp16": torch.float16}
    del values, pair
    before = torch.get_float32_matmul_precision()
    for mode, dtype in modes.items():
        torch.set_float32_matmul_precision("high" if mode == "tf32" else "highest")
        a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        rates[mode] = 2 * size**3 / _seconds(lambda a=a, b=b: a @ b, device)
    torch.set_float32_matmul_precision(before)
    return ceilings | {"flop_per_s": rates}


def _seconds(work: Callable[[], object], device: torch.device) -> float:
    """Seconds per call: the best of nine turns of at least 5 ms, since a ceiling is a maximum."""
    for _ in range(3):
        work()
    synchronize(device)
    start = time.perf_counter()
    work()
    synchronize(device)
    calls = max(1, int(5e-3 / (time.perf_counter() - start)))
    times = []
    for _ in range(9):
        start = time.perf_counter()
        for _ in range(calls):
            work()
        synchronize(device)
        times.append((time.perf_counter() - start) / calls)
    return min(times)
