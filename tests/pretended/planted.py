"""What a planted fault is: it stands beside the right way, and is told by an error or a finding."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor

from .findings import FINDINGS


class Case(ABC):
    """A fault, and what does the same without it. `told` is in the words of an error or a finding."""

    told: ClassVar[str]

    @abstractmethod
    def wrong(self) -> object:
        """The fault."""

    @abstractmethod
    def right(self) -> object:
        """What does the same without it."""


def captured(work: Callable[[], object]) -> torch.cuda.CUDAGraph:
    """Warm up, capture and replay once."""
    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        work()
    with torch.cuda.graph(graph, stream=stream):
        work()
    graph.replay()
    torch.cuda.synchronize()
    return graph


def values(count: int = 8, device: str = "cuda") -> Tensor:
    return torch.arange(count, dtype=torch.float32, device=device)


def tried(work: Callable[[], object]) -> list[str]:
    """What was told of it, in errors and in findings."""
    before = FINDINGS.snapshot()
    try:
        work()
        torch.cuda.synchronize()
    except Exception as error:
        return [*FINDINGS.errors_since(before), f"{type(error).__name__}: {error}", str(error.__context__)]
    return FINDINGS.errors_since(before)
