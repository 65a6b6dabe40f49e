"""Tensors, events, generators and launches of the wrong device, and too much memory."""

from __future__ import annotations

import torch
from torch import Tensor

from .planted import Case, captured, values


class HostWithCard(Case):
    told = "found at least two devices, cpu and cuda:0"

    def wrong(self) -> object:
        return values() + torch.ones(8)

    def right(self) -> object:
        return values() * torch.tensor(2.0) + torch.ones(8).cuda()


class CardWithCard(Case):
    told = "found at least two devices, cuda:0 and cuda:1"

    def wrong(self) -> object:
        return values(device="cuda:0") + values(device="cuda:1")

    def right(self) -> object:
        with torch.cuda.device(1):
            there = values()
        assert there.device == torch.device("cuda", 1) and torch.cuda.current_device() == 0
        found = values() + there.to("cuda")
        assert found.device == torch.device("cuda", 0) and found[3].item() == 6
        return found


class EventOfAnotherCard(Case):
    told = "does not match recording stream's device"

    def wrong(self) -> object:
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream("cuda:0"))
        return event.record(torch.cuda.current_stream("cuda:1"))

    def right(self) -> object:
        with torch.cuda.stream(torch.cuda.Stream("cuda:1")):
            assert torch.cuda.current_device() == 1
            event = torch.cuda.current_stream().record_event()
        return torch.cuda.current_stream().wait_event(event)


class TooMuchMemory(Case):
    told = "CUDA out of memory. Tried to allocate 80.00 MiB. GPU 1"

    def wrong(self) -> object:
        return torch.empty(80 << 20, dtype=torch.uint8, device="cuda:1")

    def right(self) -> object:
        for _ in range(3):
            found = torch.empty(40 << 20, dtype=torch.uint8, device="cuda:1")
            del found
        return torch.empty(40 << 20, dtype=torch.uint8, device="cuda:0")


class LaunchedElsewhere(Case):
    told = "launched on cuda:0 with memory of cuda:1"

    def _launch(self, row: Tensor) -> None:
        from .planted_kernel import double

        double[(1,)](row, 8)

    def wrong(self) -> object:
        return self._launch(values(device="cuda:1"))

    def right(self) -> object:
        row = values(device="cuda:1")
        with torch.cuda.device_of(row):
            self._launch(row)
        assert row.tolist() == list(range(0, 16, 2))
        mine = values()
        return captured(lambda: self._launch(mine))


class GeneratorElsewhere(Case):
    told = "generator"

    def wrong(self) -> object:
        return torch.randn(8, device="cuda", generator=torch.Generator())

    def right(self) -> object:
        return torch.randn(8, device="cuda", generator=torch.Generator("cuda").manual_seed(0))


class ToNumpy(Case):
    told = "can't convert cuda:0 device type tensor to numpy"

    def wrong(self) -> object:
        return values().numpy()

    def right(self) -> object:
        return values().cpu().numpy()
