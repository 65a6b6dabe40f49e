"""The cards there are, and which of them is a thread's current one."""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from .streams import Stream


@dataclass(frozen=True)
class Card:
    """A pretended GPU."""

    capability: tuple[int, int]
    memory: int  # bytes

    @property
    def arch(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"

    @property
    def name(self) -> str:
        return f"Pretended {self.arch}"


def _cards() -> list[Card]:
    capabilities = [divmod(int(one), 10) for one in (os.environ.get("PRETENDED_GPUS") or "80").split(",")]
    mebibytes = [float(one) for one in (os.environ.get("PRETENDED_MEMORY") or "16384").split(",")]
    mebibytes *= len(capabilities) if len(mebibytes) == 1 else 1
    return [Card(one, int(size * 2**20)) for one, size in zip(capabilities, mebibytes, strict=True)]


CARDS = _cards()
DEVICES = [torch.device("cuda", number) for number in range(len(CARDS))]
ARCHES = (os.environ.get("PRETENDED_ARCHES") or ",".join(sorted({card.arch for card in CARDS}))).split(",")


class _Thread(threading.local):
    """What CUDA and torch keep for each thread, and what the emulation does there."""

    def __init__(self) -> None:
        self.card = 0  # a new thread begins with the first one, as in CUDA
        self.streams: dict[int, Stream] = {}  # the current one of each card
        self.last: int | None = None  # where the operation before ran: what C++ makes without a tensor goes there
        self.raw = 0  # above 0: tensors say where they really are
        self.moving = False  # a copy between devices was asked for in Python
        self.scalar = False  # `tensor[...] = number`: the number is a kernel's argument, not a copy


THREAD = _Thread()


def index_of(device: Any = None) -> int:
    """The number of a CUDA device, the current one without a number. Raises as torch does for others."""
    if device is None:
        return THREAD.card
    if isinstance(device, int):
        index = THREAD.card if device < 0 else device
    else:
        device = torch.device(device)
        if device.type != "cuda":
            raise ValueError(f"Expected a cuda device, but got: {device}")
        index = THREAD.card if device.index is None else device.index
    if index >= len(CARDS):
        raise torch.AcceleratorError("CUDA error: invalid device ordinal")
    return index


def require_code(index: int) -> None:
    """Raises as CUDA does where the wheel has no code for a card; it runs code for its own major version."""
    major = CARDS[index].capability[0]
    if not any(int(arch.removeprefix("sm_")) // 10 == major for arch in ARCHES):
        raise torch.AcceleratorError("CUDA error: no kernel image is available for execution on the device")
