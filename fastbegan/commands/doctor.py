"""`fastbegan doctor`: the implementation that this machine runs for every op, and why."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from fastbegan_kernels import dispatch, problems, tuning
from fastbegan_kernels.conv_layer import Layer
from fastbegan_kernels.problems import Pointwise, Problem

from ..config import ModelConfig, TrainConfig
from ..device import pick_device, pick_precision, set_backends
from ..display import Display, print_facts
from ..errors import UserError
from ..runs.folder import settings_of
from ..training.capacity import capacity
from ..training.cost import step_cost
from ..training.tune import tune

Row = tuple[str, str, str]


@dataclass(frozen=True)
class Doctor:
    """Show what this machine runs for every op, and why; on a GPU every kernel is checked and timed."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto, float32, tf32, bf16 or fp16; with --tune several with commas between."""
    filters: int | None = None
    """Channels of the layers that are tried (default: 64); with --preset its n."""
    size: int | None = None
    """Height and width of their inputs (default: 32); with --preset its image size."""
    batch_size: int | None = None
    """Images per batch. Default: 16, or the preset's. With --tune those of one GPU, not of all ranks."""
    preset: str | None = None
    """Instead of layers: what a step of this preset needs on this machine, and the largest batch that fits."""
    tune: bool = False
    """With --preset on a GPU: choose all its kernels now, for the cache that runs read. For jobs of many nodes."""
    cudnn_search: Literal["auto", "off"] = "auto"
    """As for train: choices made under one setting are not used under the other."""

    def run(self) -> int:
        return doctor(self)


def doctor(options: Doctor) -> int:
    """Report on this machine's ops or on a preset, or choose a preset's kernels; returns the exit code.

    Raises UserError for bad options.
    """
    if options.preset is None:
        if options.tune:
            raise UserError("tune is True without a preset; accepted: --preset NAME --tune")
        return _ops(options)
    preset = settings_of(options.preset)
    model = preset.model.resized(options.size, options.filters)
    batch_size = preset.train.batch_size if options.batch_size is None else options.batch_size
    train = replace(preset.train, batch_size=batch_size)
    return _tune(options, model, train) if options.tune else _preset(options, model, train)


def _ops(options: Doctor) -> int:
    """Print the machine's facts and a row for each op.

    On a GPU every form is tried and timed now, whatever was chosen before.
    """
    filters = 64 if options.filters is None else options.filters
    size = 32 if options.size is None else options.size
    batch_size = 16 if options.batch_size is None else options.batch_size
    for name, value in (("filters", filters), ("size", size), ("batch-size", batch_size)):
        if value < 1 or (name == "size" and value % 2):
            raise UserError(f"{name} is {value}; accepted: {'even ' if name == 'size' else ''}numbers from 1 on")
    device, line = pick_device(options.device)
    precision, dtype = pick_precision(options.precision, device)
    set_backends(precision, search=options.cudnn_search == "auto")
    facts = [
        ("device", line),
        ("precision", f"{precision}{' (as nothing else was asked for)' if options.precision == 'auto' else ''}"),
        ("software", f"Python {platform.python_version()}, {tuning.environment(device)}"),
        *([("kernels", tier(device))] if device.type == "cuda" else []),
        ("asked for", f"FASTBEGAN_IMPL={os.environ.get('FASTBEGAN_IMPL') or '(unset: automatic)'}"),
        ("choices in", str(tuning.cache_file())),
    ]
    print_facts(facts)
    name = str(dtype or torch.float32).removeprefix("torch.")
    table = Table("op", "runs", "why", title=f"{filters} channels, {batch_size} maps of {size} x {size}, {name}")
    for row in _rows(device, name, filters, size, batch_size):
        table.add_row(*row)
    Console().print(table)
    return 0


def tier(device: torch.device) -> str:
    """The kinds of kernels that a GPU can run, and the reason where some are missing."""
    major, minor = torch.cuda.get_device_capability(device)
    chip = f"sm_{major}{minor}"
    if major < 8:
        return f"{chip}: layers by cuDNN on folded weights, since the fused ones need sm_80; pointwise ops in Triton"
    loads = "by descriptors (TMA) or pointers" if major >= 9 else "by pointers, since descriptors (TMA) need sm_90"
    return f"{chip}: fused layers in Triton, loading {loads}, or cuDNN on folded weights, whichever is faster"


def _preset(options: Doctor, model: ModelConfig, train: TrainConfig) -> int:
    """Print FLOPs and memory of a preset's step on this machine, and the largest batch that fits."""
    device, line = pick_device(options.device)
    precision, dtype = pick_precision(options.precision, device)
    set_backends(precision, search=options.cudnn_search == "auto")
    cost = step_cost(model, train, dtype)
    facts = [
        ("device", line),
        ("precision", precision),
        ("step", f"{cost.flops / 1e9:,.1f} GFLOPs at batch {train.batch_size}"),
    ]
    for name, recompute in (("memory", False), ("recompute", True)):
        result = capacity(model, replace(train, recompute=recompute), device, dtype)
        source = "ran" if result.tried else "worked out from free memory"
        sizes = f"{result.per_image / 2**20:,.1f} MiB an image and {result.fixed / 2**20:,.0f} MiB"
        facts.append((name, f"{sizes}; largest batch {result.largest:,} ({source})"))
    print_facts(facts)
    return 0


def _tune(options: Doctor, model: ModelConfig, train: TrainConfig) -> int:
    """Choose all kernels of a preset in each precision, for the cache that runs read.

    Returns 1 where a choice is not final. Raises UserError where there is no GPU.
    """
    device, line = pick_device(options.device)
    if device.type != "cuda":
        raise UserError(f"tune is True, but the device is {line}; accepted: a GPU (a CPU has no kernels)")
    print_facts([("device", line), ("choices in", str(tuning.cache_file()))])
    failed = 0
    for precision in options.precision.split(","):
        name, dtype = pick_precision(precision, device)
        set_backends(name, search=options.cudnn_search == "auto")
        with Display() as display:
            missing = tune(model, train, device, dtype, display.trying)
        failed += missing
        print_facts([(name, f"{missing} not chosen for good, as said above" if missing else "all kernels are chosen")])
    return 1 if failed else 0


def layers(dtype: str, filters: int, size: int, batch_size: int, *, tf32: bool = False) -> list[Layer]:
    """One layer of each kind, forward and input gradient.

    Args:
        dtype: As torch names it, without `torch.`.
        filters: Channels in and out.
        size: Height and width of the input.
        batch_size: Images.
        tf32: Whether float32 products may round to TF32.
    """
    problems = []
    for kind, window in (("same", 3), ("down", 3), ("up", 4)):
        x, weight = (batch_size, filters, size, size), (filters, filters, window, window)
        problems += [Layer(kind, backward, dtype, x, weight, tf32=tf32) for backward in (False, True)]
    return problems


def _rows(device: torch.device, dtype: str, filters: int, size: int, batch_size: int) -> list[Row]:
    """A row per op: its name, what runs, and why."""
    impl = dispatch.asked_for(None)
    tf32 = dtype == "float32" and device.type == "cuda" and dispatch.allows_tf32()
    layered: list[Layer] = layers(dtype, filters, size, batch_size, tf32=tf32)
    ops = {
        problem: f"{_LAYER_OPS[problem.kind]}{', input gradient' if problem.backward else ''}" for problem in layered
    }
    pointed = [
        Pointwise(op, "float32" if op in ("equilibrium_update", "normalize_images") else dtype)
        for op in problems.POINTWISE
    ]
    reason = _no_kernels(device, impl)
    if reason is not None:
        plain = "reference" if impl == "reference" else "plain PyTorch"
        folded = "algebraic: folded weights, transposed convolution"
        rows = [
            (op, folded if problem.kind == "up" and impl != "reference" else plain, reason)
            for problem, op in ops.items()
            if not problem.backward
        ]
        return rows + [(problem.op, plain, reason) for problem in pointed]
    rows = [(op, *_verdict(problem, device, impl or "auto")) for problem, op in ops.items()]
    return rows + [(problem.op, *_verdict(problem, device, impl or "auto")) for problem in pointed]


_LAYER_OPS = {"same": "conv2d_elu", "down": "conv2d_elu, stride 2", "up": "upsample_conv2d_elu"}


def _no_kernels(device: torch.device, impl: str | None) -> str | None:
    """The reason why this machine runs no Triton kernel at all; None where it runs some."""
    if impl == "reference":
        return "FASTBEGAN_IMPL asks for it"
    if not dispatch.HAS_TRITON:
        return "Triton is not installed"
    if device.type != "cuda":
        return "no GPU: the kernels are for CUDA devices"
    if dispatch.ROCM:
        return "this torch is for ROCm: the kernels are for NVIDIA GPUs"
    return None


def _verdict(problem: Problem, device: torch.device, impl: str) -> tuple[str, str]:
    """The form that runs for a problem, and the checks and times behind it; all forms are tried now."""
    outcomes = tuning.outcomes(problem, device, problem.forms(device, impl), again=True)
    right = [outcome for outcome in outcomes if outcome.fault is None]
    notes = [f"{outcome.form.name} {outcome.fault}" for outcome in outcomes if outcome.fault]
    if not right:
        return "plain PyTorch", "; ".join(notes) or "no kernel takes this"
    best = min(right, key=lambda outcome: outcome.seconds)
    timed = [(outcome.form.name, outcome.timing) for outcome in right if outcome.timing is not None]
    timed.sort(key=lambda pair: pair[1].seconds)
    notes = [f"{name} {timing.seconds * 1e6:.0f} us (spread {timing.spread:.0%})" for name, timing in timed] + notes
    return best.form.name, "right; " + ", ".join(notes) if notes else "right"
