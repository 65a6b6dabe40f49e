"""k, M and the learning rate against numbers worked out by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastbegan import Equilibrium, TrainConfig, UserError
from fastbegan.training.schedule import StallHalving, falling
from fastbegan_kernels import equilibrium_update, reference

pytestmark = pytest.mark.core


def _update(equilibrium: Equilibrium, real: float, fake: float, skip: bool | None = None) -> None:
    flag = None if skip is None else torch.tensor(skip)
    equilibrium.update(torch.tensor(real), torch.tensor(fake), flag)


def test_three_steps_by_hand() -> None:
    equilibrium = Equilibrium(gamma=0.5, lambda_k=0.001)
    _update(equilibrium, 0.4, 0.1)  # k = 0 + 0.001 (0.2 - 0.1) = 0.0001; M = 0.4 + 0.1
    assert equilibrium.k.item() == pytest.approx(0.0001, rel=1e-5)
    _update(equilibrium, 0.3, 0.2)  # k = 0.0001 + 0.001 (0.15 - 0.2) = 0.00005; M = 0.3 + 0.05
    assert equilibrium.k.item() == pytest.approx(0.00005, rel=1e-4)
    _update(equilibrium, 0.5, 0.2)  # k = 0.00005 + 0.001 (0.25 - 0.2) = 0.0001; M = 0.5 + 0.05
    row = equilibrium.read()
    assert row["convergence"] == pytest.approx((0.5 + 0.35 + 0.55) / 3)
    assert row["gap"] == pytest.approx((0.3 + 0.1 + 0.3) / 3)
    assert (row["loss_real"], row["loss_fake"]) == (pytest.approx(0.4), pytest.approx(0.5 / 3))
    assert row["k"] == pytest.approx(0.0001, rel=1e-4)  # as it is now, not its mean of 0.00005
    assert equilibrium.read()["convergence"] == 0.0  # reading starts over


def test_k_stays_within_zero_and_one() -> None:
    equilibrium = Equilibrium(gamma=1.0, lambda_k=10.0)
    _update(equilibrium, 0.1, 0.5)
    assert equilibrium.k.item() == 0
    _update(equilibrium, 0.5, 0.1)
    assert equilibrium.k.item() == 1


def test_small_moves_of_k_are_kept() -> None:
    equilibrium = Equilibrium(gamma=0.5, lambda_k=0.001)
    equilibrium.k.fill_(0.5)
    for _ in range(100):
        _update(equilibrium, 0.1, 0.04)  # 1e-5 a step, below bf16's spacing of 0.004 here
    assert equilibrium.k.item() == pytest.approx(0.501, rel=1e-5)
    assert equilibrium.k.dtype == torch.float32


def test_a_skipped_step_changes_nothing() -> None:
    equilibrium = Equilibrium()
    _update(equilibrium, 0.4, 0.1)
    before = {name: value.clone() for name, value in equilibrium.state_dict().items()}
    _update(equilibrium, float("nan"), 0.1, skip=True)
    assert all(torch.equal(value, before[name]) for name, value in equilibrium.state_dict().items())


def test_the_window_is_apart_from_the_log() -> None:
    equilibrium = Equilibrium(gamma=0.5)
    _update(equilibrium, 0.4, 0.2)
    equilibrium.read()
    _update(equilibrium, 0.6, 0.3)
    assert equilibrium.read_window() == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("field", "value", "accepted"),
    [
        ("gamma", 2, "0 to 1"),
        ("gamma", "0.5", "0 to 1"),
        ("gamma", -0.1, "0 to 1"),
        ("gamma", float("nan"), "0 to 1"),
        ("gamma", True, "0 to 1"),
        ("gamma", None, "0 to 1"),
        ("lambda_k", -1.0, "numbers from 0"),
        ("lambda_k", "1e-3", "numbers from 0"),
    ],
)
def test_what_no_controller_can_be_is_named_alike(field: str, value: Any, accepted: str) -> None:
    words = []
    for make, error in ((Equilibrium, ValueError), (TrainConfig, UserError)):
        with pytest.raises(error) as raised:
            make(**{field: value})
        words.append(str(raised.value))
    assert words == [f"{field} is {value!r}; accepted: {accepted}"] * 2
    given: dict[str, Any] = {"gamma": 0.5, "lambda_k": 1e-3, field: value}
    zero, sums, window = torch.zeros(()), torch.zeros(6), torch.zeros(2, dtype=torch.float64)
    for op in (equilibrium_update, reference.equilibrium_update):
        with pytest.raises(ValueError, match=f"{field} is .*; accepted: {accepted}"):
            op(zero, zero, zero, sums, window, **given)


def test_learning_rate_halves_on_a_stall_down_to_the_floor() -> None:
    schedule = StallHalving(1e-4, floor=2e-5)
    assert [schedule.update(m) for m in (0.3, 0.2, 0.2, 0.1)] == [1e-4, 1e-4, 5e-5, 5e-5]
    copy = StallHalving(1e-4, floor=2e-5)
    copy.load_state_dict(schedule.state_dict())
    assert [copy.update(m) for m in (0.15, 0.15, 0.15)] == [2.5e-5, 2e-5, 2e-5]
    assert StallHalving(1e-5, floor=2e-5).update(float("inf")) == 1e-5  # never raised


def test_the_rate_falls_at_the_end() -> None:
    rates = [falling(1e-3, 2e-4, 0.4, done) for done in (0.0, 0.6, 0.8, 1.0, 1.1)]
    assert rates == pytest.approx([1e-3, 1e-3, 6e-4, 2e-4, 2e-4])
    assert falling(1e-3, 2e-4, 0.0, 1.0) == 1e-3  # never
    assert falling(1e-4, 2e-4, 1.0, 0.5) == 1e-4  # never raised
