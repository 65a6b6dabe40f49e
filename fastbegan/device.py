"""The choice of device, precision and compilation: tried on the machine, not assumed."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

from fastbegan_kernels.dispatch import HAS_TRITON, ROCM

from .errors import UserError

OLD_GPU_TORCH = "2.7.1"  # the last default wheel with CUDA 12.6 and code for sm_60
_COMPILE_PAYS = {"cpu": 240.0, "cuda": 600.0}  # seconds of a run from which on a cold compilation pays
_CPU_BF16 = frozenset(("avx512_bf16", "amx_bf16", "bf16"))  # flags in /proc/cpuinfo, x86 and Arm


def pick_device(wanted: str, local: int | None = None) -> tuple[torch.device, str]:
    """Choose the device to run on.

    Args:
        wanted: auto, cpu, cuda, or cuda:N. `auto` takes a GPU that works, else the CPU.
        local: Number of this rank on its machine, which is also the number of its GPU; None outside of torchrun.

    Returns:
        The device, and one line about it, with the reason where `auto` falls back to the CPU.

    Raises:
        UserError: The name is unknown, or the GPU that it names does not work.
    """
    if wanted == "cpu":
        return torch.device("cpu"), f"cpu, {torch.get_num_threads()} threads"
    if wanted != "auto" and wanted.partition(":")[0] != "cuda":
        slice_of_a_gpu = " (a MIG slice by CUDA_VISIBLE_DEVICES=MIG-...)" if "MIG" in wanted.upper() else ""
        raise UserError(f"device is {wanted!r}; accepted: auto, cpu, cuda, cuda:N{slice_of_a_gpu}")
    name = "cuda" if wanted == "auto" else wanted
    if local is not None:
        if ":" in wanted:
            raise UserError(f"device is {wanted!r}; accepted with several ranks: auto, cpu, cuda (each has its own)")
        name = f"cuda:{local}"
    problem = gpu_problem(name)
    if problem is None:
        device = torch.device(name)
        if device.index is None:  # DALI ignores a device without a number
            device = torch.device("cuda", torch.cuda.current_device())
        torch.cuda.set_device(device)  # Triton launches kernels on the current device
        kind = "; ROCm, where none of our kernels run" if ROCM else ""
        return device, f"{device}, {torch.cuda.get_device_name(device)}{kind}"
    if wanted != "auto":
        raise UserError(f"device {wanted!r} does not work: {problem or 'torch sees no GPU here'}")
    line = f"cpu, {torch.get_num_threads()} threads"
    return torch.device("cpu"), f"{line} ({problem})" if problem else line


def gpu_problem(name: str) -> str | None:
    """Run one tiny kernel on a CUDA device: None if it works, "" if there is no GPU, else one line with advice.

    torch's own warnings do not tell: they name every unsupported card of the machine, used or not.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            if not torch.cuda.is_available():
                raise RuntimeError("torch cannot use it")
            if (torch.device(name).index or 0) >= torch.cuda.device_count():
                return f"there is no GPU of that number, {torch.cuda.device_count()} in all"
            values = torch.arange(8, device=torch.device(name), dtype=torch.float32)
            if values.mul(2).sum().item() != 56:
                raise RuntimeError("a tiny kernel gave a wrong result")
        except Exception as error:  # torch raises many types here
            failure = caught[0].message if caught and "no kernel image" in str(error) else error
        else:
            return None
    card = nvidia_smi()
    if card is None:
        return ""
    gpu, driver = card
    reason = " ".join(str(failure).split()).partition(". ")[0].partition("; ")[0][:120]
    advice = (
        "update the driver"
        if torch.__version__.startswith(OLD_GPU_TORCH)
        else f"update the driver, or use the torch for old GPUs and drivers: make venv TORCH={OLD_GPU_TORCH}"
    )
    return f"{gpu} with driver {driver} does not run torch {torch.__version__}: {reason}; {advice}"


def nvidia_smi() -> tuple[str, str] | None:
    """Name and driver version of the first NVIDIA GPU; None where nvidia-smi finds none."""
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
    """Resolve a precision: auto, float32, tf32, bf16 or fp16. `set_backends` puts it into force.

    auto is bf16 on a GPU that has it natively, else float32; on a CPU only `training.fastest` can tell better.

    Returns its name and the dtype of autocast, None for float32 and tf32. Raises UserError where the device does not
    support it.
    """
    if wanted not in ("auto", "float32", "tf32", "bf16", "fp16"):
        raise UserError(f"precision is {wanted!r}; accepted: auto, float32, tf32, bf16, fp16")
    if wanted == "auto":
        wanted = "bf16" if device.type == "cuda" and has_native_bf16(device) else "float32"
    # GPUs before Ampere have fp16 in hardware but not bf16; CPUs the other way round
    accepted = "float32, bf16" if device.type != "cuda" else "float32, fp16"
    if wanted == "tf32" and (device.type != "cuda" or torch.cuda.get_device_capability(device) < (8, 0)):
        raise UserError(f"precision 'tf32' needs an NVIDIA GPU from Ampere on; {device} accepts {accepted}")
    if wanted == "fp16" and device.type != "cuda":
        raise UserError(f"precision 'fp16' needs a GPU; {device} accepts {accepted}")
    return wanted, {"bf16": torch.bfloat16, "fp16": torch.float16}.get(wanted)


def set_backends(precision: str, *, deterministic: bool = False, search: bool = True) -> None:
    """Set the global switches of torch's libraries for this process; commands call this, ops never do.

    Args:
        precision: "tf32" rounds the inputs of float32 products and convolutions; all others keep them exact.
        deterministic: Results do not vary between runs; cuDNN's search is off.
        search: cuDNN times its algorithms for each shape.
    """
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = search and not deterministic
    if hasattr(torch.backends, "fp32_precision"):  # since torch 2.9; a value there would override the switches below
        torch.backends.fp32_precision = torch.backends.cudnn.fp32_precision = "ieee"  # pyright: ignore
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    torch.backends.cudnn.allow_tf32 = precision == "tf32"  # on by default in torch, for convolutions only


def core_count() -> int:
    """Number of CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def one_core_each(count: int) -> ThreadPoolExecutor:
    """`count` threads whose torch operations use one core each.

    Without it, torch starts a set of OpenMP threads for each thread that calls it. With more of them than cores, those
    of the training thread sleep between its operations, which makes a step up to 1.6 times as long.
    """
    torch.get_num_threads()  # fixes the calling thread's number, which the pool's setting would change otherwise
    return ThreadPoolExecutor(count, initializer=torch.set_num_threads, initargs=(1,))


def available_memory(device: torch.device) -> int:
    """Free bytes of the device's memory now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def has_native_bf16(device: torch.device) -> bool:
    """Whether the device computes with bf16 in hardware."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    return not _CPU_BF16.isdisjoint(_cpu_flags())


def cpu_info() -> list[str]:
    """Lines of /proc/cpuinfo; none on systems without it."""
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def _cpu_flags() -> list[str]:
    return next((line.split() for line in cpu_info() if line.startswith(("flags", "Features"))), [])


def no_compiler(device: torch.device) -> str | None:
    """Why torch.compile cannot work on the device, None where it can."""
    if device.type == "cuda" and not HAS_TRITON:
        return "Triton is not installed"
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    return None if shutil.which(compiler) else f"the compiler {compiler} is missing"


def pick_compile(wanted: str, device: torch.device, seconds: float) -> tuple[str | None, str]:
    """Choose torch.compile's mode: off, auto, or a mode by name. `auto` compiles runs of a few minutes and more.

    Args:
        wanted: The option.
        device: Where the run takes place.
        seconds: Estimated length of the run.

    Returns:
        The mode, None for off, and a few words on it.

    Raises:
        UserError: A mode was named, but this machine cannot compile.
    """
    if wanted == "off":
        return None, "compile off"
    missing = no_compiler(device)
    if wanted != "auto" and missing:
        raise UserError(f"compile is {wanted!r}, but {missing}; accepted here: auto, off")
    if wanted == "auto" and (missing or seconds < _COMPILE_PAYS[device.type]):
        return None, f"compile off ({missing or 'a short run'})"
    mode = "default" if wanted == "auto" else wanted
    return mode, f"compile {mode}"


@contextlib.contextmanager
def without_search() -> Iterator[None]:
    """Switch cuDNN's search off inside the block, for steps that only try whether they fit into memory."""
    before, torch.backends.cudnn.benchmark = torch.backends.cudnn.benchmark, False
    try:
        yield
    finally:
        torch.backends.cudnn.benchmark = before
