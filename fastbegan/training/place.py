"""Where and how a run computes: device, precision, passes, compilation."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from ..config import ModelConfig, TrainConfig
from ..device import pick_compile, pick_device, pick_precision, set_backends
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
    device_line: str
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
    model: ModelConfig,
    train: TrainConfig,
    device: torch.device,
    device_line: str,
    ranks: Ranks,
    compiled: str | None = None,
) -> Place:
    """Choose what the config leaves to "auto", the same on all ranks. Sets torch's global flags.

    On a CPU a measurement decides. A deterministic run takes the same on all machines, without one.

    Args:
        model: The nets.
        train: What was asked for.
        device: That of this rank.
        device_line: A line about it.
        ranks: The processes that train together.
        compiled: The mode of torch.compile with which the run began, or "off"; None for a new run.

    Raises:
        UserError: The device does not support the precision, or compilation was asked for and is not possible.
    """
    seconds, measured_line = None, ""
    if device.type == "cpu" and not train.deterministic and compiled is None:
        share = replace(train, batch_size=train.batch_size // ranks.world)
        measured = ranks.from_first(fastest(model, share, device) if ranks.first else None)
        if measured is not None:
            train = replace(train, passes=measured.passes, precision=measured.precision)
            seconds, measured_line = measured.seconds, measured.line
    precision, dtype = pick_precision(train.precision, device)
    ranks.require_same("precision", precision)
    set_backends(precision, deterministic=train.deterministic, search=train.cudnn_search == "auto")
    train = replace(train, precision=precision, passes="single-pass" if train.passes == "auto" else train.passes)
    if compiled is not None:
        length = math.inf if compiled != "off" else 0.0
    else:
        length = run_seconds(train, seconds or step_seconds(model, train, device))
    compile_mode, compile_line = pick_compile(train.compile, device, length)
    return Place(device, train, dtype, compile_mode, device_line, compile_line, measured_line)
