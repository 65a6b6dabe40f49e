"""When a step is captured and replayed; no GPU is needed to see in which order things happen."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastbegan.training.graph import GraphedStep
from fastbegan.training.profiling import steps_before_graph

pytestmark = pytest.mark.core
CUDA = torch.device("cuda", 0)


@pytest.fixture
def fake_cuda(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """torch.cuda with streams that do nothing and graphs that remember what was captured."""
    state = SimpleNamespace(capturing=False, replayed=0, discarded=0, fails=False, made=[], waits=[], captured_on=None)

    class Stream:
        def __init__(self, *_: object) -> None:
            state.made.append(self)

        def wait_stream(self, other: Stream) -> None:
            state.waits.append((self, other))

    here = Stream()
    state.made.clear()

    class Graph:
        def replay(self) -> None:
            state.replayed += 1

        def reset(self) -> None:
            state.discarded += 1

    @contextlib.contextmanager
    def capture(graph: Graph, pool: int, *, stream: Stream, capture_error_mode: str) -> Iterator[None]:
        assert capture_error_mode == "thread_local"  # threads of loaders go on
        state.capturing, state.captured_on = True, stream
        try:
            yield
        finally:
            state.capturing = False
            if state.fails:
                raise RuntimeError("operation failed due to a previous error during capture")

    for name, value in {
        "graph_pool_handle": lambda: (0, 7),
        "Stream": Stream,
        "CUDAGraph": Graph,
        "graph": capture,
        "synchronize": lambda *_: None,
        "set_stream": lambda _: None,
        "current_stream": lambda _: here,
        "stream": lambda _: contextlib.nullcontext(),
    }.items():
        monkeypatch.setattr(torch.cuda, name, value)
    return state


def test_every_call_is_one_step(fake_cuda: SimpleNamespace) -> None:
    ran: list[bool] = []
    step = GraphedStep(lambda: ran.append(fake_cuda.capturing), CUDA)
    for calls in range(1, 8):
        step()
        assert ran.count(False) + fake_cuda.replayed == calls
    assert step.captured and ran == [False] * 3 + [True]  # it warms up, is captured once, and replayed from then on
    (side,) = fake_cuda.made  # one stream of its own, that waits for the one that is current, and is waited for
    assert [side in pair for pair in fake_cuda.waits] == [True] * 6
    assert [pair[0] is side for pair in fake_cuda.waits] == [True, False] * 3
    assert fake_cuda.captured_on is side


def test_a_trace_comes_before_the_graph(fake_cuda: SimpleNamespace) -> None:
    ran: list[bool] = []
    step = GraphedStep(lambda: ran.append(fake_cuda.capturing), CUDA, after=steps_before_graph(4, 5))
    for _ in range(12):
        step()
    assert ran == [False] * 10 + [True] and fake_cuda.replayed == 2  # 5, one that warms the profiler up, and 4


def test_what_cannot_be_captured_runs_as_it_is(fake_cuda: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    """The warning names what went wrong first; the pool is closed, which torch's own end may not have come to."""
    fake_cuda.fails = True
    ran: list[bool] = []
    ended: list[tuple[int, int]] = []
    monkeypatch.setattr(torch._C, "_cuda_endAllocateToPool", lambda *found: ended.append(found), raising=False)

    def work() -> None:
        ran.append(fake_cuda.capturing)
        if fake_cuda.capturing:
            raise RuntimeError("operation not permitted when stream is capturing (.item())\nand more")

    step = GraphedStep(work, CUDA)
    for _ in range(3):
        step()
    with pytest.warns(UserWarning, match=r"could not be captured as a CUDA graph.*not permitted .* \(\.item\(\)\)$"):
        step()
    assert ended == [(0, (0, 7))]
    stub = (Path(torch.__file__).parent / "_C" / "__init__.pyi").read_text()
    assert "def _cuda_endAllocateToPool(" in stub or "def _cuda_endAllocateCurrentStreamToPool(" in stub
    step()
    assert ran == [False] * 3 + [True] + [False] * 2 and not step.captured


@pytest.mark.parametrize("fails", [False, True])
def test_ranks_replay_all_or_none(fake_cuda: SimpleNamespace, fails: bool) -> None:
    """Another rank failed; this one may have too."""
    fake_cuda.fails = fails
    ran: list[bool] = []
    asked: list[bool] = []
    step = GraphedStep(lambda: ran.append(fake_cuda.capturing), CUDA, agree=lambda mine: bool(asked.append(mine)))
    for _ in range(3):
        step()
    with pytest.warns(UserWarning, match="could not be captured" if fails else "another rank could not capture"):
        step()
    step()
    assert asked == [not fails] and ran == [False] * 3 + [True] + [False] * 2
    assert fake_cuda.replayed == 0 and fake_cuda.discarded == int(not fails)


@pytest.mark.parametrize(("device", "enabled"), [(CUDA, False), (torch.device("cpu"), True)])
def test_without_graphs(device: torch.device, enabled: bool) -> None:
    ran: list[None] = []
    step = GraphedStep(lambda: ran.append(None), device, enabled=enabled)
    for _ in range(6):
        step()
    assert len(ran) == 6 and not step.captured and not step.enabled


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graphed_step_is_the_step() -> None:
    weight = torch.ones((), device=CUDA)
    step = GraphedStep(lambda: (weight.mul_(2), None)[1], CUDA)
    for _ in range(7):
        step()
    assert step.captured and weight.item() == 2.0**7
