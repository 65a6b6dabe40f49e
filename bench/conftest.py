"""Options and the interleaved comparison that every benchmark here uses."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="the smallest shapes only, few rounds")


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture
def compare(benchmark, request: pytest.FixtureRequest, device: torch.device) -> Callable[..., float]:
    """`compare(baseline, candidate)` times both turn by turn; returns how many times faster the candidate is."""

    def timed(function: Callable[[], object]) -> Callable[[], object]:
        def run() -> object:
            result = function()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return result

        return run

    def run(baseline: Callable[[], object], candidate: Callable[[], object]) -> float:
        slow, fast, times = timed(baseline), timed(candidate), list[float]()

        def setup() -> None:
            start = time.perf_counter()
            slow()
            times.append(time.perf_counter() - start)

        for function in (slow, fast, slow, fast):
            function()
        benchmark.pedantic(fast, setup=setup, rounds=8 if request.config.getoption("--quick") else 25)
        baseline_ms, candidate_ms = 1e3 * statistics.median(times), 1e3 * benchmark.stats.stats.median
        benchmark.extra_info.update(
            device=str(device), baseline_ms=baseline_ms, candidate_ms=candidate_ms, ratio=baseline_ms / candidate_ms
        )
        print(
            f"\n{request.node.name}: {baseline_ms:.1f} ms -> {candidate_ms:.1f} ms, {baseline_ms / candidate_ms:.2f}x"
        )
        return baseline_ms / candidate_ms

    return run
