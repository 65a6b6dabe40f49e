"""Forwards that cannot be followed without changing what they do: they are told, and put back, whoever else runs."""

from __future__ import annotations

import copy
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbegan.convert import accelerate, restore
from fastbegan.convert.follow import CannotFollowError, follow
from tests.helpers.families import Interpolating, images, made

pytestmark = pytest.mark.core
Forward = Callable[[Any, Tensor], Any]


def _inside(forward: Callable[[Any, Tensor], Tensor]) -> Any:
    """A model whose forward calls a part that can be followed in a way that cannot."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ELU())
            self.calls, self.seen = 0, []
            self.register_buffer("scale", torch.ones(()))

    Odd.forward = forward  # pyright: ignore[reportAttributeAccessIssue]
    return Odd()


def _counts(self: Any, x: Tensor) -> Tensor:
    self.calls += 1
    return self.part(x) * self.calls


def _remembers(self: Any, x: Tensor) -> Tensor:
    self.seen.append(x)
    return self.part(x)


def _freezes(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = self.part(x)
    return y + self.part(x)


def _makes_a_tensor(self: Any, x: Tensor) -> Tensor:
    return self.part(x) + torch.ones(1)


def _recomputes(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.part, x, use_reentrant=False)  # pyright: ignore[reportReturnType]


def _recomputes_reentrant(self: Any, x: Tensor) -> Tensor:
    return checkpoint(self.part, x, use_reentrant=True)  # pyright: ignore[reportReturnType]


def _asks_for_the_type(self: Any, x: Tensor) -> Tensor:
    return self.part(x) if isinstance(x, Tensor) else self.part(x[0])


def _asks_torch(self: Any, x: Tensor) -> Tensor:
    return self.part(x) if torch.is_tensor(x) else self.part(x[0])


def _casts(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return self.part(x)


def _reads_a_buffer(self: Any, x: Tensor) -> Tensor:
    return self.part(x) if self.scale > 0 else x


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (_counts, "it writes Odd.calls"),
        (_remembers, "it writes Odd.seen"),
        (_freezes, "it switches gradients or autocast on or off inside"),
        (_casts, "it switches gradients or autocast on or off inside"),
        (_makes_a_tensor, "it makes a tensor out of nothing but numbers"),
        (_recomputes, "it changes what the backward keeps"),
        (_recomputes_reentrant, "it changes what the backward keeps"),
        (_asks_for_the_type, "asks for the type of a value"),
        (_asks_torch, "asks for the type of a value"),
        (_reads_a_buffer, "it branches on values or shapes"),
    ],
)
def test_what_would_change_silently_is_not_followed(forward: Callable[[Any, Tensor], Tensor], why: str) -> None:
    """The part inside is accelerated all the same, the forward around it stays its own."""
    model, x = _inside(forward), images(2, 3, 6, 6).requires_grad_()
    with pytest.raises(CannotFollowError, match=why):
        follow(model, {})
    accelerate(model)
    assert model.calls == 0 and model.seen == [] and not hasattr(model, "_tensor_constant0")
    assert "forward" not in vars(model) and list(model.fastbegan_report.replaced) == ["part.0"]
    found = model(x)
    restore(model)
    model.calls = 0
    torch.testing.assert_close(found, model(x), atol=1e-2 if forward is _casts else 1e-5, rtol=1e-5)
    with pytest.raises(RuntimeError, match="not accelerated"):
        restore(model)


def _reads_a_config(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * m.config.gain


def _keeps(m: Any, x: Tensor) -> Tensor:
    m.kept.append(m.conv(x))
    return m.layers(x)


def _counts_inside(m: Any, x: Tensor) -> Tensor:
    m.table["counts"]["calls"] += 1
    return m.layers(x) * m.table["counts"]["calls"]


def _switches_off(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        return m.layers(x.float())


def _switches_on(m: Any, x: Tensor) -> Tensor:
    with torch.enable_grad():
        return m.layers(x)


def _asks(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) if torch.is_grad_enabled() else 2 * m.layers(x)


def _draws(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) if random.random() < 0.5 else 2 * m.layers(x)


def _draws_by_torch(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * (1.0 if torch.rand(1).item() < 0.5 else 2.0)


def _draws_by_numpy(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * float(np.random.rand())


@pytest.mark.parametrize(
    ("forward", "why"),
    [
        (_reads_a_config, "it reads Made.config, a SimpleNamespace, which may change unseen"),
        (_keeps, "it writes Made.kept"),
        (_counts_inside, "it writes Made.table"),
        (_switches_off, "it switches gradients or autocast"),
        (_switches_on, "it switches gradients or autocast"),
        (_asks, "it asks whether gradients or autocast are on"),
        (_draws, "it draws random numbers that depend on no tensor"),
        (_draws_by_torch, "it draws random numbers that depend on no tensor"),
        (_draws_by_numpy, "it draws random numbers that depend on no tensor"),
    ],
)
def test_what_cannot_be_noted_is_not_followed(forward: Forward, why: str) -> None:
    """In whatever mode it is asked."""
    model, states = made(forward), (random.getstate(), torch.get_rng_state())
    for mode in (torch.enable_grad(), torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16)):
        with mode, pytest.raises(CannotFollowError, match=why):
            follow(model, {})
    accelerate(model)
    assert "forward" not in vars(model) and set(model.fastbegan_report.replaced) == {"layers.0", "layers.2"}
    assert model.table == {"gain": 1.0, "counts": {"calls": 0}} and not model.kept
    assert random.getstate() == states[0] and torch.equal(torch.get_rng_state(), states[1])


def test_around_what_cannot_be_followed_the_rest_is() -> None:
    inner = made(_reads_a_config)
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ELU(), inner, nn.Conv2d(3, 3, 3, padding=1), nn.ReLU())
    own = copy.deepcopy(model)
    accelerate(model)
    report: Any = model.fastbegan_report
    # not "0": what is not followed may write into what it is given
    assert set(report.replaced) == {"3", "2.layers.0", "2.layers.2"}
    x = images(2, 3, 6, 6)
    for gain in (1.0, 3.0):
        inner.config.gain = gain
        own[2].config.gain = gain  # pyright: ignore
        torch.testing.assert_close(model(x), own(x))


def test_threads_do_not_meet() -> None:
    """Four accelerate their own model while another one runs an unrelated one."""
    errors: list[BaseException] = []
    done = threading.Event()

    def guarded(work: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            try:
                work()
            except BaseException as error:
                errors.append(error)

        return run

    other = nn.Sequential(nn.Linear(3, 3), nn.ReLU())

    def runs() -> None:
        while not done.is_set():
            other(torch.ones(1, 3))

    def follows() -> None:
        model = accelerate(Interpolating())
        assert len(model.fastbegan_report.replaced) == 4  # pyright: ignore

    call = nn.Module.__call__
    runner = threading.Thread(target=guarded(runs))
    runner.start()
    workers = [threading.Thread(target=guarded(follows)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done.set()
    runner.join()
    assert not errors and nn.Module.__call__ is call and "__getattribute__" not in vars(nn.Module)
