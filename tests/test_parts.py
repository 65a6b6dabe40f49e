"""A batch in parts, one after another or on several ranks: the same step as in one piece."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbegan import ModelConfig, TrainConfig, TrainStep, UserError
from fastbegan.data.choose import same_images
from fastbegan.display import Display
from fastbegan.distributed.bucket import Bucket
from fastbegan.distributed.ranks import Flight, LostContactError, Ranks
from fastbegan.layers import Equilibrium
from fastbegan.nets.models import build
from fastbegan.runs.checkpoint import list_checkpoints
from fastbegan.runs.folder import RunConfig
from fastbegan.training import checkpoints
from fastbegan.training.loop import NOT_FINITE, Training
from fastbegan.training.objective import OBJECTIVES
from fastbegan_kernels import tuning

pytestmark = pytest.mark.core
MODEL = ModelConfig(size=16, filters=4, hidden=6, latent=6, widths=(1, 2))
TRAIN = TrainConfig(batch_size=6, lr=1e-3)
MODES = [
    (passes, *way)
    for passes in OBJECTIVES
    for way in (("simultaneous", "shared"), ("simultaneous", "independent"), ("alternating", "independent"))
]
EVERY = pytest.mark.parametrize(("passes", "updates", "latents"), MODES)


class _Sum(Flight):
    """Is not there before it lands."""

    def __init__(self, values: Tensor, found: Tensor) -> None:
        super().__init__(None)
        self.values, self.found = values, found
        values.fill_(float("nan"))

    def land(self) -> None:
        self.values.copy_(self.found)


class _Threads(Ranks):
    """Ranks that are threads of this process."""

    def __init__(self, rank: int, world: int, given: list[Tensor | None], barrier: threading.Barrier) -> None:
        super().__init__(rank, world, rank)
        self.given, self.barrier, self.sums = given, barrier, 0

    def begin_sum(self, values: Tensor) -> Flight:
        self.sums += 1
        self.given[self.rank] = values.clone()
        self.barrier.wait(300)
        found = torch.stack([one for one in self.given if one is not None]).sum(0)
        self.barrier.wait(300)
        return _Sum(values, found)


def _ranks(world: int) -> list[_Threads]:
    given: list[Tensor | None] = [None] * world
    barrier = threading.Barrier(world)
    return [_Threads(rank, world, given, barrier) for rank in range(world)]


def _step(ranks: Ranks | None = None, **options: Any) -> TrainStep:
    step = TrainStep(*build(MODEL, seed=0), replace(TRAIN, **options), ranks=ranks)
    step.equilibrium.k.fill_(0.4)
    return step


def _batch() -> list[Tensor]:
    torch.manual_seed(1)
    real = torch.rand(6, 3, 16, 16).mul(2).sub(1).contiguous(memory_format=torch.channels_last)
    return [real, torch.rand(6, 6) * 2 - 1, torch.rand(6, 6) * 2 - 1]


def _watch(step: TrainStep) -> list[Tensor]:
    """Fills with the gradients that the optimizers get."""
    seen: list[Tensor] = []
    for optimizer in (step.optimizer_d, step.optimizer_g):

        def keep(optimizer: torch.optim.Optimizer, *_: object) -> None:
            for group in optimizer.param_groups:
                seen.extend(p.grad.clone() for p in group["params"])

        optimizer.register_step_pre_hook(keep)
    return seen


def _assert_near(found: list[Tensor], expected: list[Tensor]) -> None:
    assert len(found) == len(expected) > 0
    for a, b in zip(found, expected, strict=True):
        assert (a - b).norm() <= 1e-5 * b.norm() + 1e-8


@EVERY
def test_parts_one_after_another(passes: str, updates: str, latents: str) -> None:
    options: dict[str, Any] = {"passes": passes, "updates": updates, "latents": latents}
    whole, parts = _step(**options), _step(accumulate=3, **options)
    expected, found = _watch(whole), _watch(parts)
    for step in (whole, parts):
        step(*_batch())
    _assert_near(found, expected)
    assert torch.allclose(parts.equilibrium.sums, whole.equilibrium.sums, rtol=1e-5)


@EVERY
@pytest.mark.parametrize("accumulate", [1, 3])
def test_parts_on_several_ranks(passes: str, updates: str, latents: str, accumulate: int) -> None:
    options: dict[str, Any] = {"passes": passes, "updates": updates, "latents": latents}
    whole = _step(**options)
    steps = [_step(ranks, accumulate=accumulate, **options) for ranks in _ranks(2)]
    expected, found = _watch(whole), [_watch(step) for step in steps]
    whole(*_batch())
    steps[1].wish.fill_(1)
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda step, *part: step(*part), steps, *([*one.chunk(2)] for one in _batch())))
    for one in found:
        _assert_near(one, expected)
    for step in steps:
        assert torch.allclose(step.equilibrium.sums, whole.equilibrium.sums, rtol=1e-5)
        assert step.wished > 0  # what one rank wants all know
    assert steps[0].fingerprint() == steps[1].fingerprint()


def test_nan_on_one_rank_holds_all_back() -> None:
    steps = [_step(ranks) for ranks in _ranks(2)]
    before = [p.detach().clone() for step in steps for p in step.parameters()]
    real, z, _ = (one.chunk(2) for one in _batch())
    z[1][0, 0] = float("nan")
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(lambda step, x, draw: step(x, draw, draw), steps, real, z))
    assert all(step.found_bad == 1 and step.bad_step == 1 for step in steps)
    after = [p for step in steps for p in step.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_g_travels_before_d_has_seen_x(monkeypatch: pytest.MonkeyPatch) -> None:
    step = _step(accumulate=2)
    told: list[str] = []
    real_loss = type(step.objective)._difference  # type: ignore[attr-defined]

    def difference(*arguments: Any) -> Tensor:
        told.append("D sees x")
        return real_loss(*arguments)

    monkeypatch.setattr(type(step.objective), "_difference", difference)
    step.objective.ready = lambda net: told.append("G" if net is step.generator else "D")
    step._buckets = {}
    step(*_batch())
    assert told == ["G", "D sees x", "D"] * 2


def test_what_was_sent_is_not_sent_again() -> None:
    """torch.compile may fail after G's gradients have left: the other ranks wait for one sum, not for two."""
    net = torch.nn.Linear(2, 1, bias=False)
    (ranks,) = _ranks(1)
    ranks.world = 2  # a second one that is silent
    bucket = Bucket(net, ranks, 1)
    for value in (1.0, 5.0):
        bucket.begin()
        net.weight.grad = torch.full((1, 2), value)
        bucket.collect()
    bucket.finish()
    assert ranks.sums == 1 and torch.equal(net.weight.grad, torch.full((1, 2), 0.5))


def test_lost_contact_is_no_failure_of_torch_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    (ranks,) = _ranks(1)
    ranks.world = 2
    step = TrainStep(*build(MODEL, seed=0), TRAIN, ranks=ranks)

    def lost(_: Tensor) -> Flight:
        raise LostContactError("broken pipe")

    monkeypatch.setattr(ranks, "begin_sum", lost)
    monkeypatch.setattr(step.objective, "compiled", True, raising=False)
    before = step.objective
    with pytest.raises(LostContactError):
        step(*_batch())
    assert step.objective is before


def test_a_step_that_failed_leaves_no_sum_to_the_next() -> None:
    """As one does that cannot be captured: the step after it sends as many sums as any."""
    (ranks,) = _ranks(1)
    ranks.world = 2  # a second one that is silent
    step = TrainStep(*build(MODEL, seed=0), TRAIN, ranks=ranks)
    sums = []
    for fails in (False, True, False):
        before = ranks.sums
        with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError) if fails else contextlib.nullcontext():
            if fails:
                collect = step.objective.ready
                patch.setattr(step.objective, "ready", lambda net, collect=collect: (collect(net), int("x")))
            step(*_batch())
        sums.append(ranks.sums - before)
    assert sums == [3, 1, 3]


@pytest.mark.parametrize(("rule", "factor"), [("none", 1.0), ("sqrt", 2.0), ("linear", 4.0)])
def test_rates_grow_with_the_batch(rule: str, factor: float) -> None:
    config = replace(TRAIN, batch_size=64, scaling=rule)
    step = TrainStep(*build(MODEL, seed=0), config)
    assert config.scale == factor
    assert step.optimizer_g.param_groups[0]["lr"].item() == pytest.approx(factor * config.lr)
    assert step.equilibrium.lambda_k == pytest.approx(factor * config.lambda_k)


def test_what_this_rank_breaks_is_no_lost_contact() -> None:
    for message, kind in (
        ("Connection closed by peer", LostContactError),
        ("CUDA error: an illegal memory access was encountered", RuntimeError),
    ):

        class Work:
            def wait(self, message: str = message) -> None:
                raise RuntimeError(message)

        with pytest.raises(kind, match=message):
            Flight(Work()).land()


def test_ranks_may_know_different_things_of_the_same_images() -> None:
    ranks = _ranks(1)[0]
    pack, files = ({"count": 9, "crc32": one, "files": two} for one, two in ((5, None), (None, "ab")))
    for other, fits in ((files, True), ({**pack, "crc32": 6}, False), ({**files, "count": 8}, False)):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ranks, "gather", lambda value, other=other: [value, other])
            with contextlib.nullcontext() if fits else pytest.raises(UserError, match="data of rank 1 is"):
                ranks.require_same("data", pack, same_images)


def test_a_wait_at_a_checkpoint_counts_as_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who hangs before it is behind the others, so it is named."""
    ranks, told = Ranks(0, 2), list[str]()
    monkeypatch.setattr(ranks, "tick", lambda: told.append("tick"))
    monkeypatch.setattr(ranks, "gather", lambda value: (told.append("gather"), [value, value])[1])
    ranks.require_equal(lambda: 1, "step 1", tmp_path)
    assert ranks.agree(True) and told == ["tick", "gather"] * 2


class _Pair(Ranks):
    """One of two ranks, with another that always says the same."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 2)
        self.told: list[object] = []
        self.meets: Callable[[], object] = lambda: None
        self.watch: Any = SimpleNamespace(settle=self.told.append, begin=lambda step: None, tick=lambda: None)

    def begin_sum(self, values: Tensor) -> Flight:
        return _Sum(values, values * 2)

    def gather(self, value: Any) -> list[Any]:
        self.told.append(self.meets())
        return [value] * 2

    def from_first(self, value: Any) -> Any:
        return value


def _training(folder: Path, ranks: Ranks, **options: Any) -> Training:
    config = replace(TRAIN, data="faces:64", device="cpu", compile="off", steps=10, **options)
    with Display(quiet=True) as display:
        return Training(RunConfig("demo", MODEL, config), folder, resume=True, display=display, ranks=ranks)


def test_all_ranks_wait_until_the_first_has_said_what_was_not_finite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ranks = _Pair(0)
    training = _training(tmp_path / "run", ranks)
    training.advance_one()
    written: list[str] = []
    monkeypatch.setattr(training.checkpoints, "finish", lambda: written.append("checkpoint"))
    ranks.told.clear()
    ranks.meets = lambda: (*written, training.folder.nonfinite_file.exists())
    assert training._stop_not_finite() == NOT_FINITE
    assert ranks.told == [False, False, ("checkpoint", True)]  # patient while it says so


def test_steps_are_settled_but_for_the_first_sheet(tmp_path: Path) -> None:
    """Which a checkpoint is not."""
    ranks = _Pair(0)
    training = _training(tmp_path / "run", ranks)
    settled: list[object] = []
    for _ in range(6):
        ranks.told.clear()
        training.advance_one()
        settled += [message for message in ranks.told if message is not None]
    assert settled == [True]
    ranks.told.clear()
    training.checkpoints.save(training.progress.done, training.state)
    assert False not in ranks.told
    training.checkpoints.finish()
    ranks.told.clear()
    for _ in range(2):
        training.sheets.draw(training.progress.done)
    assert ranks.told == [False, True, True]


@pytest.mark.parametrize("rank", [0, 1])
def test_the_first_rank_chooses_the_kernel_of_k_for_all(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    """Each rank computes k for itself, and two kernels may differ in its last bit."""
    told: list[str] = []
    step = _step(_Pair(rank))
    monkeypatch.setattr(Equilibrium, "update", lambda *_: told.append("choose"))
    monkeypatch.setattr(tuning, "adopt", lambda *_: told.append("adopt"))
    step.adopt_kernels()
    assert told == ["choose", "adopt"][rank:]


def test_a_step_does_not_wait_until_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save, disk = checkpoints.save_checkpoint, threading.Event()
    monkeypatch.setattr(checkpoints, "save_checkpoint", lambda *what: (disk.wait(300), save(*what)))
    config = TrainConfig(data="faces:64", batch_size=8, steps=40, device="cpu", precision="float32")
    with Display(quiet=True) as display:
        training = Training(RunConfig("demo", MODEL, config), tmp_path / "run", resume=True, display=display)
        training.advance_one()
        training.checkpoints.save(training.progress.done, training.state)
        training.advance_one()
        assert not list_checkpoints(tmp_path / "run" / "checkpoints")
        disk.set()
        training.checkpoints.finish()
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["000000001"]
