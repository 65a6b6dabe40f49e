"""Options, the race that every benchmark here is, and the table at the end."""

from __future__ import annotations

import ctypes
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from rich.console import Console

from bench import ops
from bench.cases import DEVICE, ON_CPU
from bench.regression import Accepted
from fastbegan.device import available_memory
from fastbegan.measure.machine import facts, roofline, synchronize
from fastbegan.measure.results import Results, Row, count_lines, ratio, spread, table
from fastbegan_kernels import tuning
from fastbegan_kernels.child import Trial

FOLDER = Path(__file__).parent
_BEGIN = time.monotonic()
_WORTH = ("step", "conv_stage", "forms", "upsample_conv2d_elu", "conv2d_elu")  # files by what they tell; others follow
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of malloc.h
Turn = Callable[[], object]


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("fastbegan")
    group.addoption("--quick", action="store_true", help="one small shape of each, few turns, one compilation")
    group.addoption("--sizes", default="", help="image sizes, with commas between; default: all that suit the device")
    group.addoption("--impl", choices=("reference", "algebraic", "fused"), help="the tier to race; default: automatic")
    group.addoption("--budget", type=float, help="seconds after which no other benchmark begins, the weightiest first")
    group.addoption("--results", type=Path, help="JSON file that gets each row as it comes, beside what it holds")
    group.addoption("--baselines", type=Path, default=FOLDER / "baselines", help="folder of accepted ratios")
    group.addoption("--update-baselines", action="store_true", help="accept the ratios of this run")


def clock() -> float:
    """Seconds, once the device has finished."""
    synchronize(DEVICE)
    return time.perf_counter()


@dataclass
class Suites:
    """One run of the suites."""

    results: Results
    path: Path | None
    accepted: Accepted
    updates: bool
    turns: tuple[int, int]
    seconds: float
    measured: list[Row] = field(default_factory=list)

    def keep(self, row: Row) -> None:
        """Note a row, at once on disk: a run that is cut off keeps what it measured."""
        self.measured.append(row)
        self.results.rows = [*(other for other in self.results.rows if other.key != row.key), row]
        self.save()

    def save(self) -> None:
        if self.path:
            self.results.save(self.path)


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.option.benchmark_quiet = True  # its own table shows only one contender of each race
    config.addinivalue_line("filterwarnings", "default")
    if impl := config.getoption("--impl"):
        os.environ["FASTBEGAN_IMPL"] = impl
    _keep_memory()


def _keep_memory() -> None:
    """Have glibc keep freed memory: else a large buffer costs page faults or none, depending on earlier benchmarks."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 1 << 25)  # the most it takes
        mallopt(_M_TRIM_THRESHOLD, 1 << 30)


_runs: list[Suites] = []


@pytest.fixture(scope="session")
def suites(request: pytest.FixtureRequest) -> Suites:
    option = request.config.getoption
    machine, quick = facts(DEVICE), bool(option("--quick"))
    path, updates = option("--results"), bool(option("--update-baselines"))
    results = _begun(path, machine) or Results(machine, roofline(DEVICE, quick=quick))
    accepted = Accepted(Path(str(option("--baselines"))), machine)
    suites = Suites(results, path, accepted, updates, *(((9, 15), 1.5) if quick else ((9, 40), 4.0)))
    suites.save()
    _runs.append(suites)
    return suites


def _begun(path: Path | None, machine: dict[str, Any]) -> Results | None:
    """What other processes measured on this machine at this commit, to go on with it."""
    if path is None or not path.exists():
        return None
    results = Results.load(path)
    return results if results.machine == machine | {"date": results.machine.get("date")} else None


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--budget") is not None:
        order = {f"bench_{name}": place for place, name in enumerate(_WORTH)}
        items.sort(key=lambda item: order.get(item.path.stem, len(order)))


@dataclass
class Race:
    """The one timer: contenders take turns, so that a drift of the machine hits all of them."""

    benchmark: BenchmarkFixture
    suites: Suites

    def __call__(
        self,
        row: Row,
        turns: dict[str, Turn],
        *,
        calls: dict[str, int] | None = None,
        least: int | None = None,
        anew: Callable[[], dict[str, Turn]] | None = None,
    ) -> Row:
        """Fill `row` with the time of the first of `turns`, which is ours, and its ratio to each of the others.

        The second of `turns` is the baseline, whose ratio is held to the accepted one. Below the band it is measured
        again, and fails the benchmark if it is below once more; the lower of both is what `--update-baselines` accepts.

        Args:
            row: gets the results.
            turns: what is timed, by name; each a call or several.
            calls: how many calls a turn of this name makes; 1 by default.
            least: rounds to take however long one lasts.
            anew: makes the turns of the second time, with new buffers: where they lie can slow a small op by a tenth.
        """
        accepted, updates = self.suites.accepted, self.suites.updates
        calls = dict.fromkeys(turns, 1) | (calls or {})
        self._fill(row, self._timed(turns, self._benchmarked, least), calls)
        once, fell = row.ratio, accepted.fell(row)
        if fell or updates:
            self._fill(row, self._timed(anew() if anew else turns, self._again, least), calls)
            fell = accepted.fell(row)
        if updates:
            accepted.accept(row.key, once, row.ratio)
        self.suites.keep(row)
        self.benchmark.extra_info.update(row=row.key, ratios=row.ratios)
        if fell and not updates:
            pytest.fail(f"{row.key}: {once:.2f} and {row.ratio:.2f} times as fast, {row.accepted:.2f} was accepted")
        return row

    def _fill(self, row: Row, times: dict[str, list[float]], calls: dict[str, int]) -> None:
        own, *others = ({name: [value / calls[name] for value in values]} for name, values in times.items())
        (mine,) = own.values()
        row.p20, row.ms, row.p80 = (1e3 * value for value in spread(mine))
        row.ratios = {name: ratio(values, mine) for other in others for name, values in other.items()}

    def _timed(
        self, turns: dict[str, Turn], race: Callable[..., list[float]], least: int | None
    ) -> dict[str, list[float]]:
        own, *others = turns
        times: dict[str, list[float]] = {name: [] for name in turns}

        def rest() -> None:
            for name in others:
                begin = clock()
                turns[name]()
                times[name].append(clock() - begin)

        for turn in turns.values():
            turn()
        begin = clock()
        for turn in turns.values():
            turn()
        usual, most = self.suites.turns
        rounds = max(least or usual, min(most, int(self.suites.seconds / (clock() - begin))))
        times[own] = race(turns[own], rest, rounds)
        return times

    def _benchmarked(self, turn: Turn, setup: Turn, rounds: int) -> list[float]:
        self.benchmark.pedantic(turn, setup=setup, rounds=rounds)
        if self.benchmark.stats is None:  # by --benchmark-disable, or by pytest-xdist
            pytest.skip("pytest-benchmark is disabled")
        return list(self.benchmark.stats.stats.data)

    def _again(self, turn: Turn, setup: Turn, rounds: int) -> list[float]:
        times = []
        for _ in range(rounds):
            setup()
            begin = clock()
            turn()
            times.append(clock() - begin)
        return times


@pytest.fixture
def race(benchmark: BenchmarkFixture, suites: Suites) -> Race:
    benchmark._timer = clock
    return Race(benchmark, suites)


def pytest_runtest_setup(item: pytest.Item) -> None:
    budget = item.config.getoption("--budget")
    if budget is not None and time.monotonic() > _BEGIN + budget:
        pytest.skip(f"no time left of --budget {budget:g}")


@pytest.fixture(autouse=True)
def _clean() -> Iterator[None]:
    # trials of kernels in a process of their own are not measured here, and take their time
    with mock.patch.object(tuning, "survivors", lambda problem, device, hows, **_: dict.fromkeys(hows, Trial(None))):
        yield
    if not ON_CPU:
        torch.cuda.empty_cache()


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return bool(request.config.getoption("--quick"))


@pytest.fixture
def sizes(request: pytest.FixtureRequest) -> list[int]:
    """The image sizes of --sizes; empty: all."""
    return _sizes(request.config)


def _sizes(config: pytest.Config) -> list[int]:
    text = str(config.getoption("--sizes"))
    try:
        return [int(size) for size in text.split(",") if size]
    except ValueError:
        raise pytest.UsageError(f"--sizes is {text!r}; accepted: image sizes with commas between") from None


@pytest.fixture
def needs() -> Callable[[float], None]:
    """`needs(bytes)` skips where the device has less memory free."""

    def check(wanted: float) -> None:
        free = available_memory(DEVICE)
        if wanted > 0.9 * free:
            pytest.skip(f"needs {wanted / 2**20:,.0f} MiB, {free / 2**20:,.0f} MiB are free")

    return check


class Shape(NamedTuple):
    """A layer's larger side, its channels, and whether it is the first of its suite."""

    px: int
    filters: int
    first: bool


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" in metafunc.fixturenames:
        quick = metafunc.config.getoption("--quick")
        sides = _sizes(metafunc.config) or ([32] if quick else [32, 64] if ON_CPU else [64, 128, 32, 256])
        filters = (32,) if ON_CPU else (64,) if quick else (128, 64)
        shapes = [Shape(px, n, (px, n) == (sides[0], filters[0])) for px in sides for n in filters]
        metafunc.parametrize("shape", shapes, ids=[f"{shape.px}px-n{shape.filters}" for shape in shapes])


@pytest.fixture
def race_op(race: Race, needs: Callable[[float], None], quick: bool) -> Callable[..., Row]:
    """`ops.race_op(case, row)`."""
    return partial(ops.race_op, race=race, needs=needs, quick=quick)


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not _runs:
        return
    (suites,) = _runs
    results, accepted = replace(suites.results, rows=suites.measured), suites.accepted
    if results.rows:
        Console(width=max(150, terminalreporter._tw.fullwidth)).print(table(results))
    for line in count_lines(results):
        terminalreporter.write_line(line)
    if suites.updates:
        accepted.save()
        terminalreporter.write_line(f"accepted from now on: {accepted.path}")
    elif not accepted.known:
        terminalreporter.write_line(f"no accepted ratios for this device: {accepted.path} is not there")
    if suites.path:
        terminalreporter.write_line(f"written: {suites.path}")
