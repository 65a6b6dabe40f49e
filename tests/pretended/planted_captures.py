"""What may not be in a capture, and graphs that read what is gone."""

from __future__ import annotations

import torch

from .planted import Case, captured, values


class HostIndex(Case):
    told = "index from the host's memory"

    def wrong(self) -> object:
        row = values()
        return captured(lambda: row[[3, 5]].sum())

    def right(self) -> object:
        row = values()
        return captured(lambda: row[3:7:2].sum())


class ItemInCapture(Case):
    told = "_local_scalar_dense"

    def wrong(self) -> object:
        row = values()
        return captured(lambda: row.mul_(row.sum().item()))

    def right(self) -> object:
        row = values()
        return captured(lambda: row.mul_(row.sum()))


class PageableInCapture(Case):
    told = "copy from pageable memory"

    def wrong(self) -> object:
        row = values()
        return captured(lambda: row.add_(torch.tensor([1.0], device="cuda")))

    def right(self) -> object:
        row, pinned = values(), torch.ones(8).pin_memory()
        return captured(lambda: (row.add_(torch.ones(1, device="cuda")), row.copy_(pinned, non_blocking=True)))


class CopyToHostInCapture(Case):
    told = "copy to the host"

    def wrong(self) -> object:
        row = values()
        return captured(lambda: row.cpu())

    def right(self) -> object:
        row, pinned = values(), torch.zeros(8).pin_memory()
        graph = captured(lambda: pinned.copy_(row, non_blocking=True))
        assert pinned.tolist() == list(range(8))
        return graph


class MaskInCapture(Case):
    told = "index by a mask"

    def wrong(self) -> object:
        row = values()
        return captured(lambda: row[row > 3].sum())

    def right(self) -> object:
        row = values()

        def work() -> None:
            row[row > 3] = 0.0  # torch takes masked_fill for it
            torch.where(row > 1, row, 0.0).sum()

        return captured(work)


class SynchronizeInCapture(Case):
    told = "torch.cuda.synchronize"

    def wrong(self) -> object:
        row = values()
        return captured(lambda: (row.mul_(2), torch.cuda.synchronize()))

    def right(self) -> object:
        row = values()
        graph = captured(lambda: row.mul_(2))
        assert row[1].item() == 4  # the warm-up's and the replay's, not the capture's
        return graph


class TimingInCapture(Case):
    told = "an event with timing"

    def wrong(self) -> object:
        event = torch.cuda.Event(enable_timing=True)
        return captured(event.record)

    def right(self) -> object:
        event = torch.cuda.Event()
        return captured(event.record)


class WaitOutOfCapture(Case):
    told = "wait for an event from before the capture"

    def wrong(self) -> object:
        event = torch.cuda.current_stream().record_event()
        return captured(lambda: torch.cuda.current_stream().wait_event(event))

    def right(self) -> object:
        side, row = torch.cuda.Stream(), values()
        side.wait_stream(torch.cuda.current_stream())

        def work() -> None:
            here = torch.cuda.current_stream()
            side.wait_stream(here)  # joins the capture
            with torch.cuda.stream(side):
                row.add_(1)
            here.wait_stream(side)

        return captured(work)


class GraphReadsFreed(Case):
    told = "a graph reads freed memory"

    def wrong(self) -> object:
        out = values()

        def of_gone() -> torch.cuda.CUDAGraph:
            row = values()
            return captured(lambda: out.add_(row))

        graph = of_gone()
        graph.replay()
        return graph

    def right(self) -> object:
        row, out = values(), values()
        graph = captured(lambda: out.add_(row * 2))  # what was made in the capture is the graph's own
        graph.replay()
        assert row[2].item() == 2 and out[2].item() == 2 + 3 * 4
        return graph
