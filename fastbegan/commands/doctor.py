"""`fastbegan doctor`: what this machine runs for every op, and why."""

from __future__ import annotations

import os
import platform
from dataclasses import dataclass, replace
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table

from fastbegan_kernels import dispatch, problems, tuning
from fastbegan_kernels.problems import Layer, Pointwise

from ..config import ModelConfig, TrainConfig, find_preset
from ..device import pick_device, pick_precision, set_backends
from ..display import Display
from ..errors import UserError
from ..training.capacity import capacity
from ..training.cost import step_cost
from ..training.tune import tune

Row = tuple[str, str, str]


@dataclass(frozen=True)
class Doctor:
    """What this machine runs for every op, and why; on a GPU every kernel is checked and timed."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto, float32, tf32, bf16 or fp16; with --tune several with commas between."""
    filters: int | None = None
    """Channels of the layers that are tried (default: 64), or n of the preset."""
    size: int | None = None
    """Height and width of their inputs (default: 32), or the preset's image size."""
    batch_size: int | None = None
    """Images at once. Default: 16, or the preset's. With --tune those of one GPU, not of all ranks."""
    preset: str | None = None
    """Instead of layers: what a step of this preset needs here, and the largest batch that fits."""
    tune: bool = False
    """With --preset on a GPU: choose all its kernels now, into the cache that runs read; before a job of many nodes."""
    cudnn_search: Literal["auto", "off"] = "auto"
    """As for train: what is chosen under one setting is not used under the other."""

    def run(self) -> int:
        return doctor(self)


def doctor(options: Doctor) -> int:
    """Tell about this machine's ops, about a preset on it, or choose a preset's kernels; returns the exit code.

    Raises UserError for bad values.
    """
    if options.preset is None:
        if options.tune:
            raise UserError("tune is True without a preset; accepted: --preset NAME --tune")
        return _ops(options)
    preset = find_preset(options.preset)
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
    where, line = pick_device(options.device)
    used, dtype = pick_precision(options.precision, where)
    set_backends(used, search=options.cudnn_search == "auto")
    facts = [
        ("device", line),
        ("precision", f"{used}{' (as nothing else was asked for)' if options.precision == 'auto' else ''}"),
        ("software", f"Python {platform.python_version()}, {tuning.environment(where)}"),
        *([("kernels", tier(where))] if where.type == "cuda" else []),
        ("asked for", f"FASTBEGAN_IMPL={os.environ.get('FASTBEGAN_IMPL') or '(unset: automatic)'}"),
        ("choices in", str(tuning.cache_file())),
    ]
    for name, value in facts:
        print(f"{name:<12}{value}")
    name = str(dtype or torch.float32).removeprefix("torch.")
    table = Table("op", "runs", "why", title=f"{filters} channels, {batch_size} maps of {size} x {size}, {name}")
    for row in _rows(where, name, filters, size, batch_size):
        table.add_row(*row)
    Console().print(table)
    return 0


def tier(device: torch.device) -> str:
    """What kinds of kernels a GPU has, and why not more."""
    major, minor = torch.cuda.get_device_capability(device)
    chip = f"sm_{major}{minor}"
    if major < 8:
        return f"{chip}: layers by cuDNN on folded weights, since the fused ones need sm_80; pointwise ops in Triton"
    loads = "by descriptors (TMA) or pointers" if major >= 9 else "by pointers, since descriptors (TMA) need sm_90"
    return f"{chip}: fused layers in Triton, loading {loads}, or cuDNN on folded weights, whichever is faster"


def _preset(options: Doctor, model: ModelConfig, train: TrainConfig) -> int:
    """Print what a step of a preset does and needs here, and the largest batch that fits."""
    where, line = pick_device(options.device)
    used, dtype = pick_precision(options.precision, where)
    set_backends(used, search=options.cudnn_search == "auto")
    cost = step_cost(model, train, dtype)
    facts = [
        ("device", line),
        ("precision", used),
        ("step", f"{cost.flops / 1e9:,.1f} GFLOPs at batch {train.batch_size}"),
    ]
    for name, recompute in (("memory", False), ("recompute", True)):
        found = capacity(model, replace(train, recompute=recompute), where, dtype)
        how = "ran" if found.tried else "worked out from free memory"
        each, fixed = found.per_image / 2**20, found.fixed / 2**20
        facts.append((name, f"{each:,.1f} MiB an image and {fixed:,.0f} MiB; largest batch {found.largest:,} ({how})"))
    for name, value in facts:
        print(f"{name:<12}{value}")
    return 0


def _tune(options: Doctor, model: ModelConfig, train: TrainConfig) -> int:
    """Choose all kernels of a preset in each precision, into the cache that runs read, before a job of many nodes.

    Returns 1 where some could not be chosen for good. Raises UserError where there is no GPU to choose for.
    """
    where, line = pick_device(options.device)
    if where.type != "cuda":
        raise UserError(f"tune is True, but the device is {line}; accepted: a GPU (a CPU has no kernels)")
    print(f"{'device':<12}{line}\n{'choices in':<12}{tuning.cache_file()}")
    failed = 0
    for precision in options.precision.split(","):
        used, dtype = pick_precision(precision, where)
        set_backends(used, search=options.cudnn_search == "auto")
        with Display() as display:
            missing = tune(model, train, where, dtype, display.trying)
        failed += missing
        print(f"{used:<12}{f'{missing} not chosen for good, as said above' if missing else 'all kernels are chosen'}")
    return 1 if failed else 0


def layers(dtype: str, filters: int, size: int, batch_size: int, *, tf32: bool = False) -> list[Layer]:
    """Each kind of layer, forward and back to the layer before it."""
    found = []
    for kind, window in (("same", 3), ("down", 3), ("up", 4)):
        x, weight = (batch_size, filters, size, size), (filters, filters, window, window)
        found += [Layer(kind, backward, dtype, x, weight, tf32=tf32) for backward in (False, True)]
    return found


def _rows(device: torch.device, dtype: str, filters: int, size: int, batch_size: int) -> list[Row]:
    asked = dispatch.asked_for(None)
    tf32 = dtype == "float32" and device.type == "cuda" and dispatch.allows_tf32()
    layered: list[Layer] = layers(dtype, filters, size, batch_size, tf32=tf32)
    ops = {
        problem: f"{_LAYER_OPS[problem.kind]}{', input gradient' if problem.backward else ''}" for problem in layered
    }
    pointed = [
        Pointwise(op, "float32" if op in ("equilibrium_update", "normalize_images") else dtype)
        for op in problems.POINTWISE
    ]
    reason = _no_kernels(device, asked)
    if reason is not None:
        plain = "reference" if asked == "reference" else "plain PyTorch"
        folded = "algebraic: folded weights, transposed convolution"
        rows = [
            (op, folded if problem.kind == "up" and asked != "reference" else plain, reason)
            for problem, op in ops.items()
            if not problem.backward
        ]
        return rows + [(problem.op, plain, reason) for problem in pointed]
    rows = [(op, *_verdict(problem, device, asked or "auto")) for problem, op in ops.items()]
    return rows + [(problem.op, *_verdict(problem, device, asked or "auto")) for problem in pointed]


_LAYER_OPS = {"same": "conv2d_elu", "down": "conv2d_elu, stride 2", "up": "upsample_conv2d_elu"}


def _no_kernels(device: torch.device, asked: str | None) -> str | None:
    """Why no kernel of ours runs here at all, None where some do."""
    if asked == "reference":
        return "FASTBEGAN_IMPL asks for it"
    if not dispatch.HAS_TRITON:
        return "Triton is not installed"
    if device.type != "cuda":
        return "no GPU: the kernels are for CUDA devices"
    if dispatch.ROCM:
        return "this torch is for ROCm: the kernels are for NVIDIA GPUs"
    return None


def _verdict(problem: Layer | Pointwise, device: torch.device, impl: str) -> tuple[str, str]:
    hows = tuning.forms(problem, device, impl)
    found = tuning.outcomes(problem, device, hows, again=True)
    right = [outcome for outcome in found if outcome.fault is None]
    notes = [f"{outcome.how} {outcome.fault}" for outcome in found if outcome.fault]
    if not right:
        return "plain PyTorch", "; ".join(notes) or "no kernel takes this"
    best = min(right, key=lambda outcome: outcome.seconds or 0.0)
    timed = sorted((outcome.seconds, outcome.how) for outcome in right if outcome.seconds is not None)
    notes = [f"{how} {seconds * 1e6:.0f} us" for seconds, how in timed] + notes
    return best.how, "right; " + ", ".join(notes) if notes else "right"
