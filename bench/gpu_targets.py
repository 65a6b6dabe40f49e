"""What the kernels promise, held against what was measured."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from bench.gpu_cases import DRY, DTYPES, Case, Outcome, case_of
from bench.gpu_timed_cases import BATCHES, HUGE, MAPS, best, map_side

Measured = Iterator[tuple[str, float]]  # where, and by what factor or share


@dataclass(frozen=True)
class Target:
    """A bound on every one of `wanted` measurements."""

    name: str
    least: float
    above: bool  # must be more than the bound, not only as much
    wanted: int
    found: list[tuple[str, float]]

    def row(self) -> list[str]:
        """Name, bound, the worst that was measured and where, how many of how many, verdict."""
        needs = f"{'>' if self.above else '>='} {self.least:g}"
        count = f"{len(self.found)} of {self.wanted}"
        if not self.found:
            return [self.name, needs, "-", "-", count, "not measured"]
        where, worst = min(self.found, key=lambda pair: pair[1])
        met = worst > self.least if self.above else worst >= self.least
        verdict = "fail" if not met else "pass" if len(self.found) >= self.wanted else "not measured everywhere"
        return [self.name, needs, f"{worst:.3f}", where, count, "not measured" if DRY else verdict]


def _ratios(outcomes: Iterable[Outcome], direction: str, rival: str, *own: str) -> Measured:
    """How many times the rival's time is that of the best of our own forms."""
    for outcome in outcomes:
        case, measured = case_of(outcome["case"]), outcome.get(direction, {})
        mine, other = best(measured, *own), best(measured, rival)
        if mine and other:
            where = f"{case.op} n {case.shape[1]} map {map_side(case)} batch {case.shape[0]}: {mine[0]}"
            yield where, other[1] / mine[1]


def _large_up(outcome: Outcome) -> bool:
    case = case_of(outcome["case"])
    return case.op == "up" and case.shape[1] == 128 and map_side(case) >= 32


def copy_rate(facts: Outcome) -> float:
    """The larger of the two copies that were measured, in bytes read and written a second; 0 where none was."""
    return max(facts.get("copy_bytes_per_s", 0.0), facts.get("copy_256_mib_bytes_per_s", 0.0))


def moved_bytes(case: Case) -> int:
    """What a loss must read and write: both tensors and the gradients, once."""
    return math.prod(case.shape[:4]) * DTYPES[case.mode].itemsize * (4 if case.extra else 3)


def _bandwidths(outcomes: Iterable[Outcome], rate: float) -> Measured:
    """Shares of the copy bandwidth that the one-pass loss reaches on huge tensors."""
    for outcome in outcomes:
        case = case_of(outcome["case"])
        own = best(outcome.get("forward", {}), "fused")
        if case.op == "one_pass" and own and rate and moved_bytes(case) >= 3 * HUGE:
            shape = "x".join(map(str, case.shape[:4]))
            yield f"{case.mode} {shape}, {2 if case.extra else 1} gradients", moved_bytes(case) / own[1] * 1e3 / rate


def target_rows(results: Outcome) -> list[list[str]]:
    """A row per promise; its bound must hold at every shape."""
    layers = [outcome for outcome in results["layers"] if outcome["status"] == "timed"]
    large = [outcome for outcome in layers if _large_up(outcome)]
    plain = [outcome for outcome in layers if outcome["case"]["op"] in ("same", "down")]
    sizes = len(BATCHES) * sum(size >= 32 for size in MAPS)
    shares = list(_bandwidths(results["small"], copy_rate(results["facts"][0])))
    ours = "fused", "auto"
    targets = [
        Target("up-conv both ways, n 128, 32 to 128 px: eager / best", 3, False, sizes,
               list(_ratios(large, "both", "eager", *ours))),
        Target("the same: algebraic / best", 1, True, sizes, list(_ratios(large, "both", "algebraic", *ours))),
        Target("conv forward: algebraic / best tile", 1, False, 4 * len(BATCHES) * len(MAPS),
               list(_ratios(plain, "forward", "algebraic", "fused"))),
        Target("one-pass loss and gradients, tensors of 256 MiB: share of copy bandwidth", 0.85, False, 4, shares),
    ]  # fmt: skip
    return [["target", "needs", "worst", "where", "measured", "verdict"], *(target.row() for target in targets)]
