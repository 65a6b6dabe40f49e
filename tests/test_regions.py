"""Between fast layers maps stay channels_last; formats change on edges that leave, and nowhere else."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbegan.convert import accelerate, calls, compare
from tests.helpers.families import images

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("take_all")]


@pytest.fixture
def borders(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The borders that are crossed, in their order."""
    crossed: list[str] = []
    real = calls.Border.forward

    def forward(ctx: Any, x: Tensor, inside_last: bool, gradient_last: bool) -> Tensor:
        crossed.append("in" if inside_last else "out")
        return real(ctx, x, inside_last, gradient_last)

    monkeypatch.setattr(calls.Border, "forward", staticmethod(forward))
    yield crossed


class _Net(nn.Module):
    """Two up-convolutions; `between` makes of the first one's output what the second one reads."""

    def __init__(self, between: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.inner, self.norm, self.drop = nn.Conv2d(4, 4, 5, padding=2), nn.GroupNorm(2, 4), nn.Dropout(0.5)
        self.batch, self.instance, self.wide = nn.BatchNorm2d(4), nn.InstanceNorm2d(4), nn.Conv2d(8, 4, 1)
        self.between = between

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(F.interpolate(x, scale_factor=2))
        return self.second(F.interpolate(self.between(self, y), scale_factor=2))


def _kept(m: Any, y: Tensor) -> Tensor:
    m.seen = y * 2
    return torch.tanh(y)


def _written(m: Any, y: Tensor) -> Tensor:
    z = y * 2
    z[:, 0] = 5.0
    return z + y


BETWEEN: dict[str, tuple[Callable[[Any, Tensor], Tensor], list[str]]] = {
    "pointwise": (lambda m, y: torch.tanh(y) * 2, ["in", "out"]),
    "an addition": (lambda m, y: torch.tanh(y) + y, ["in", "out"]),
    "a number for each channel": (lambda m, y: torch.tanh(y) * m.inner.bias[:, None, None], ["in", "out"]),
    "another convolution": (lambda m, y: m.inner(y), ["in", "out"]),
    "a group norm": (lambda m, y: F.silu(m.norm(torch.tanh(y))), ["in", "out"]),
    "concatenated": (lambda m, y: m.wide(torch.cat((y, torch.sigmoid(y)), 1)), ["in", "out"]),
    "an instance norm": (lambda m, y: m.instance(torch.tanh(y)), []),
    "a dropout": (lambda m, y: m.drop(y), []),
    "flattened": (lambda m, y: y.flatten(1).view(y.shape) * 2, []),
    "read outside too": (_kept, ["in", "out", "out"]),
    "written in place": (_written, []),
}


@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("name", BETWEEN)
def test_borders_are_crossed_where_a_region_begins_and_ends(name: str, last: bool, borders: list[str]) -> None:
    between, expected = BETWEEN[name]
    torch.manual_seed(0)
    own: Any = _Net(between)
    x = images(2, 3, 4, 4)
    if last:
        own, x = own.to(memory_format=torch.channels_last), x.contiguous(memory_format=torch.channels_last)
        if name == "flattened":
            pytest.skip("torch itself has no such view")
    model = accelerate(copy.deepcopy(own))
    before, exact = compare.values(own, x), compare.truth(own, x)
    compare.compare(before, compare.values(model, x), exact).require_near()
    assert not model.fastbegan_report.breaks
    torch.manual_seed(1)
    borders.clear()
    y = model(x)
    assert borders == ([] if last else expected)
    torch.manual_seed(1)
    assert y.stride() == own(x).stride()
    if hasattr(own, "seen"):
        assert model.seen.stride() == own.seen.stride()


def test_what_leaves_a_region_may_be_written_in_place() -> None:
    model: Any = accelerate(_Net(_kept))
    y = model(images(2, 3, 4, 4))
    model.seen.mul_(2)
    y.add_(1).sum().backward()
    assert model.first.weight.grad is not None


def test_the_gradient_that_enters_is_contiguous() -> None:
    """A user's function before a region sees the format that torch's own convolution gives it."""
    formats: list[bool] = []

    class Looks(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x * 1

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            formats.append(grads[0].is_contiguous())
            return grads[0]

    model = accelerate(_Net(lambda m, y: torch.tanh(y)))
    model(Looks.apply(images(2, 3, 4, 4).requires_grad_())).sum().backward()
    assert formats == [True]
