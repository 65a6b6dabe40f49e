"""Which captures of CUDA graphs are under way, and what may not happen meanwhile."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, NoReturn

import torch

from .findings import CAPTURE, FINDINGS

if TYPE_CHECKING:
    from .graphs import CUDAGraph
    from .streams import Stream

UNDER_WAY: list[CUDAGraph] = []


def capture_on(stream: Stream | None) -> CUDAGraph | None:
    """The capture that a stream's work goes to."""
    return next((graph for graph in UNDER_WAY if stream in graph.streams), None)


def capture_of_thread() -> CUDAGraph | None:
    """The capture that this thread has begun."""
    me = threading.get_ident()
    return next((graph for graph in UNDER_WAY if graph.thread == me), None)


def refuse(graph: CUDAGraph, what: str, reason: str = "operation not permitted when stream is capturing") -> NoReturn:
    """End a capture as CUDA does: this call raises, and so does the capture's end."""
    FINDINGS.note(CAPTURE, what)
    graph.broken = True
    raise torch.AcceleratorError(f"CUDA error: {reason} ({what})")


def require_no_capture(what: str) -> None:
    """Raises where CUDA takes a call for unsafe: this thread captures, or another one in the mode "global"."""
    graph = capture_of_thread() or next((graph for graph in UNDER_WAY if graph.mode == "global"), None)
    if graph is not None:
        refuse(graph, what)
