"""Where and how a run computes: device, precision, passes, compilation."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from ..config import ModelConfig, TrainConfig
from ..device import no_compiler, pick_compile, pick_device, pick_precision, set_backends
from ..distributed.ranks import Ranks
from .cost import run_seconds, step_seconds
from .fastest import fastest


@dataclass(frozen=True)
class Place:
    """Where and how a run computes, and a few words on it for its first lines."""

    device: torch.device
    train: TrainConfig
    """With `precision` and `passes` chosen."""
    dtype: torch.dtype | None
    """Compute type of both nets; None for float32."""
    compile_mode: str | None
    compile_line: str
    measured_line: str
    """Empty where nothing was measured."""


def find_device(train: TrainConfig, ranks: Ranks) -> tuple[torch.device, str]:
    """The device of this rank, of the same kind on all, and a line about it.

    Raises UserError where it does not work, or not with the precision and compilation that were asked for.
    """
    device, line = pick_device(train.device, None if ranks.alone else ranks.local)
    ranks.require_same("device", device.type)
    pick_precision(train.precision, device)
    pick_compile(train.compile, device, 0.0)
    return device, line


def choose(
    model: ModelConfig, train: TrainConfig, device: torch.device, ranks: Ranks, compiled: str | None = None
) -> Place:
    """Choose what the config leaves to "auto", the same on all ranks. Sets torch's global flags.

    On a CPU a measurement decides. A deterministic run takes the same on all machines, without one.

    Args:
        model: The nets.
        train: What was asked for.
        device: That of this rank, from `find_device`.
        ranks: The processes that train together.
        compiled: The mode of torch.compile with which the run began, or "off"; None for a new run.
    """
    kept = compiled if train.compile == "auto" else None
    measured = None
    if device.type == "cpu" and not train.deterministic and kept is None:
        measured = ranks.from_first(fastest(model, train, device, ranks.world) if ranks.first else None)
    if measured is not None:
        train = replace(train, passes=measured.passes, precision=measured.precision)
    precision, dtype = pick_precision(train.precision, device)
    ranks.require_same("precision", precision)
    set_backends(precision, deterministic=train.deterministic, search=train.cudnn_search == "auto")
    train = replace(train, precision=precision, passes="single-pass" if train.passes == "auto" else train.passes)
    if kept is not None:
        missing = no_compiler(device) if kept != "off" else None
        mode = None if missing or kept == "off" else kept
        line = f"compile {mode or 'off'} ({missing or 'as the run began'})"
    elif train.compile == "auto":
        step = measured.seconds if measured is not None else step_seconds(model, train, device) / ranks.world
        mode, line = pick_compile("auto", device, run_seconds(train, step))
    else:
        mode, line = pick_compile(train.compile, device, 0.0)
    return Place(device, train, dtype, mode, line, "" if measured is None else measured.line)
