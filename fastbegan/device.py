"""Which device and which precision: tried, not assumed."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import torch

from fastbegan_kernels.dispatch import HAS_TRITON

from .errors import UserError

OLD_GPU_TORCH = "2.7.1"  # the last default wheel with CUDA 12.6 and code for sm_60
_COMPILE_PAYS = 600.0  # seconds of a run that a cold compilation of 20 to 60 s is worth its while for
_CPU_BF16 = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # cpuinfo's names, x86 and Arm


def pick_device(wanted: str, local: int | None = None) -> tuple[torch.device, str]:
    """The device to run on and one line about it. `auto` falls back to the CPU and says why.

    Of several ranks, the `local`-th on its machine has the GPU of that number. Raises UserError for an unknown name,
    and for a GPU that was asked for by name and does not work.
    """
    if wanted == "cpu":
        return torch.device("cpu"), f"cpu, {torch.get_num_threads()} threads"
    if wanted != "auto" and wanted.partition(":")[0] != "cuda":
        raise UserError(f"device is {wanted!r}; accepted: auto, cpu, cuda, cuda:N")
    name = "cuda" if wanted == "auto" else wanted
    if local is not None:
        if ":" in wanted:
            raise UserError(f"device is {wanted!r}; accepted with several ranks: auto, cpu, cuda (each has its own)")
        name = f"cuda:{local}"
    problem = gpu_problem(name)
    if problem is None:
        device = torch.device(name)
        if device.index is not None:  # kernels that are launched by Triton go to the current one
            torch.cuda.set_device(device)
        return device, f"{device}, {torch.cuda.get_device_name(device)}"
    if wanted != "auto":
        raise UserError(f"device {wanted!r} does not work: {problem or 'torch sees no GPU here'}")
    line = f"cpu, {torch.get_num_threads()} threads"
    return torch.device("cpu"), f"{line} ({problem})" if problem else line


def gpu_problem(name: str) -> str | None:
    """Run one tiny kernel on a CUDA device: None if it works, "" if there is no GPU, else one line on what to do."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # torch only warns about a card it has no code for, then fails later
            if not torch.cuda.is_available():
                raise RuntimeError("torch cannot use it")
            if (torch.device(name).index or 0) >= torch.cuda.device_count():
                return f"there is no GPU of that number, {torch.cuda.device_count()} in all"
            values = torch.arange(8, device=torch.device(name), dtype=torch.float32)
            if values.mul(2).sum().item() != 56:
                raise RuntimeError("a tiny kernel gave a wrong result")
    except Exception as error:  # torch raises many types here
        card = nvidia_smi()
        if card is None:
            return ""
        gpu, driver = card
        reason = " ".join(str(error).split()).partition(". ")[0].partition("; ")[0][:120]
        advice = (
            "update the driver"
            if torch.__version__.startswith(OLD_GPU_TORCH)
            else f"update the driver, or use the torch for old GPUs and drivers: make venv TORCH={OLD_GPU_TORCH}"
        )
        return f"{gpu} with driver {driver} does not run torch {torch.__version__}: {reason}; {advice}"
    return None


def nvidia_smi() -> tuple[str, str] | None:
    """Name and driver of the first NVIDIA GPU according to its driver, None without one."""
    if (program := shutil.which("nvidia-smi")) is None:
        return None
    query = [program, "--query-gpu=name,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    gpu, _, driver = done.stdout.partition("\n")[0].partition(", ")
    return (gpu, driver) if done.returncode == 0 and driver else None


def pick_precision(wanted: str, device: torch.device) -> tuple[str, torch.dtype | None]:
    """Resolve `auto` and set up matrix arithmetic: the precision's name and the autocast dtype (None: float32).

    Raises UserError where the device cannot do it.
    """
    if wanted not in ("auto", "float32", "tf32", "bf16", "fp16"):
        raise UserError(f"precision is {wanted!r}; accepted: auto, float32, tf32, bf16, fp16")
    if wanted == "auto":
        wanted = "bf16" if _has_native_bf16(device) else "float32"
    if wanted == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f"precision 'tf32' needs an NVIDIA GPU from Ampere on; {device} accepts float32, bf16")
    if wanted == "fp16" and device.type != "cuda":
        raise UserError(f"precision 'fp16' needs a GPU; {device} accepts float32, bf16")
    torch.set_float32_matmul_precision("high" if wanted == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = wanted == "tf32"  # torch's default is on, for convolutions only
    return wanted, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(wanted)


def _has_native_bf16(device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not _CPU_BF16.isdisjoint(_cpu_flags())


def _cpu_flags() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []
    return next((line.split() for line in lines if line.startswith(("flags", "Features"))), [])


def pick_compile(wanted: str, device: torch.device, seconds: float) -> tuple[str | None, str]:
    """torch.compile's mode (None: off) and a few words on it, for a run of about `seconds`.

    Raises UserError where compilation is asked for and cannot work.
    """
    if wanted == "off":
        return None, "compile off"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    missing = None if shutil.which(compiler) else f"the compiler {compiler} is missing"
    if device.type == "cuda" and not HAS_TRITON:
        missing = "Triton is not installed"
    if wanted != "auto" and missing:
        raise UserError(f"compile is {wanted!r}, but {missing}; accepted here: auto, off")
    if wanted == "auto" and (missing or seconds < _COMPILE_PAYS):
        return None, f"compile off ({missing or 'a short run'})"
    mode = "default" if wanted == "auto" else wanted
    return mode, f"compile {mode}"


def make_deterministic() -> None:
    """Only operations whose results do not vary between runs on the same hardware."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
