"""Numbers copied from the device without waiting for them."""

from __future__ import annotations

import torch
from torch import Tensor


class Reading:
    """An asynchronous copy to the host of `numbers`, as they are after the work queued on the device so far."""

    def __init__(self, numbers: Tensor) -> None:
        self._event: torch.cuda.Event | None = None
        self._host = torch.empty_like(numbers, device="cpu", pin_memory=numbers.is_cuda)
        self._host.copy_(numbers, non_blocking=True)
        if numbers.is_cuda:
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(numbers.device))

    def arrived(self) -> bool:
        """Whether `values` returns without waiting."""
        return self._event is None or self._event.query()

    def values(self) -> list[float]:
        """The numbers. Waits until the copy is complete."""
        if self._event is not None:
            self._event.synchronize()
        return self._host.tolist()
