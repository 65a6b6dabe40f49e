"""Streams that do not wait for each other, and hosts that do not wait for copies."""

from __future__ import annotations

import torch
from torch import Tensor

from .planted import Case, values


class PinnedReused(Case):
    told = "pinned memory changed too soon"

    def wrong(self) -> object:
        pinned, row = torch.ones(8).pin_memory(), values()
        row.copy_(pinned, non_blocking=True)
        pinned.fill_(2)
        torch.cuda.synchronize()
        return row

    def right(self) -> object:
        pinned, row = torch.ones(8).pin_memory(), values()
        row.copy_(pinned, non_blocking=True)
        torch.cuda.current_stream().record_event().synchronize()
        pinned.fill_(2)
        torch.cuda.synchronize()
        return row


class PinnedReadTooSoon(Case):
    told = "not there yet"

    def wrong(self) -> object:
        pinned = torch.zeros(8).pin_memory().copy_(values(), non_blocking=True)
        assert pinned.tolist() == list(range(8)), "not there yet"
        return pinned

    def right(self) -> object:
        pinned, event = torch.zeros(8).pin_memory().copy_(values(), non_blocking=True), torch.cuda.Event()
        event.record()
        while not event.query():
            pass
        assert pinned.tolist() == list(range(8))
        return pinned


class NoWait(Case):
    told = "race: read on stream"

    def wrong(self) -> object:
        row = values()
        with torch.cuda.stream(torch.cuda.Stream()):
            return row.sum()

    def right(self) -> object:
        row, side = values(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            found = row.sum()
        torch.cuda.current_stream().wait_stream(side)
        return found + row.add_(1).sum()


class NoWaitBack(Case):
    told = "race: write on stream"

    def wrong(self) -> object:
        row, side = values(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            row.sum()
        return row.add_(1)

    def right(self) -> object:
        row, side = values(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            row.sum()
        side.synchronize()  # the host waits, and gives no work meanwhile
        return row.add_(1)


class FreedEarly(Case):
    told = "freed early"

    def _use(self) -> tuple[Tensor, torch.cuda.Stream]:
        row, side = values(), torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            row.sum()
        return row, side

    def wrong(self) -> object:
        row, _ = self._use()
        del row
        return values()

    def right(self) -> object:
        row, side = self._use()
        row.record_stream(side)
        del row
        found = [values()]
        row, side = self._use()
        torch.cuda.current_stream().wait_stream(side)
        del row
        return [*found, values()]
