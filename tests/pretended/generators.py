"""Random number generators: C++ makes them on the CPU only, so a card's are known by their number."""

from __future__ import annotations

from typing import Any

import torch

from .devices import DEVICES, index_of

_cards: dict[int, tuple[torch.device, Any]] = {}
_CPU = torch.device("cpu")


class Generator(torch._C.Generator):
    """torch.Generator."""

    def __new__(cls, device: Any = "cpu") -> Generator:
        device = torch.device(device)
        made = super().__new__(cls, "cpu")  # pyright: ignore[reportCallIssue]
        if device.type == "cuda":
            _cards[made._cdata] = DEVICES[index_of(device)], made  # kept, so that its number stays its own
        return made

    def __init__(self, device: Any = "cpu") -> None:
        pass

    @property
    def device(self) -> torch.device:  # pyright: ignore[reportIncompatibleVariableOverride]
        return device_of(self)


def device_of(generator: Any) -> torch.device:
    """Where a generator draws; operations are given it as C++ sees it."""
    return _cards[generator._cdata][0] if generator._cdata in _cards else _CPU
