"""What a review of accelerate broke: writes in place, changed modules and attributes, surroundings, threads."""

from __future__ import annotations

import copy
import math
import pickle
import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from fastbegan.convert import accelerate, calls, chains, compare, gains, restore
from tests.helpers.families import Interpolating, images, made

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("take_all")]
Forward = Callable[[Any, Tensor], Any]
X = images(2, 3, 6, 6)


def _alias_written(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    y = F.interpolate(x, scale_factor=2)
    x.add_(1)
    return m.act(m.conv(y)) + x.mean()


def _skip_relu(m: Any, x: Tensor) -> Any:
    x = x * 1
    h = m.conv(m.up(x))
    F.relu(x, inplace=True)
    return m.act(h), x


def _view_written(m: Any, x: Tensor) -> Tensor:
    x = x * 1
    flat = x.flatten(1)
    y = m.up(x)
    flat.mul_(3)
    return m.act(m.conv(y))


def _written_after(m: Any, x: Tensor) -> Any:
    x = x * 1
    z = m.act(m.conv(m.up(x)))
    x.add_(2)
    return z, x


def _added_in_place(m: Any, x: Tensor) -> Any:
    y = x * 1
    alias = y
    y += 1
    alias **= 2
    return m.act(m.conv(y)), alias


def _written_view(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.conv(x))
    y[:, :2].add_(1)
    return y


def _written_list(m: Any, x: Tensor) -> Tensor:
    kept = [m.act(m.conv(x))]
    kept[0] += x
    return kept[0] * 2


def _written_data(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.conv(x))
    y.data.mul_(-1)
    return y


def _flattened(m: Any, x: Tensor) -> Tensor:
    y = m.act(m.conv(x))
    return m.linear(y.view(y.size(0), -1))


def _sliced(m: Any, x: Tensor) -> Tensor:
    return m.layers[2:](m.layers[:2](x))


def _makes_a_module(m: Any, x: Tensor) -> Tensor:
    return nn.ReLU()(m.conv(x)) + m.layers(x)


def _numpy_gain(m: Any, x: Tensor) -> Tensor:
    return F.leaky_relu(m.conv(x), 0.2) * m.root_two + F.elu(F.conv2d(x, m.other.weight * (1 / np.sqrt(9)), padding=1))


def _hypernetwork(m: Any, x: Tensor) -> Tensor:
    weight = m.act(m.conv(x[:1, :, :3, :3])).expand(3, -1, -1, -1)
    return F.relu(F.conv2d(x, weight, padding=1))


def _padded_then_written(m: Any, x: Tensor) -> Any:
    x = x * 1
    y = m.act(F.conv2d(F.pad(x, (1, 1, 1, 1)), m.conv.weight, m.conv.bias))
    x.mul_(2)
    return y, x


def _plain_end_written(m: Any, x: Tensor) -> Tensor:
    y = m.convs[1](m.act(m.convs[0](x)))
    y.mul_(2)
    return y


@pytest.mark.parametrize(
    "forward",
    [
        _alias_written,
        _skip_relu,
        _view_written,
        _written_after,
        _added_in_place,
        _written_view,
        _written_list,
        _written_data,
        _flattened,
        _sliced,
        _makes_a_module,
        _numpy_gain,
        _hypernetwork,
        _padded_then_written,
        _plain_end_written,
    ],
)
def test_the_same_whatever_a_forward_does(forward: Forward) -> None:
    model = made(forward)
    own = copy.deepcopy(model)
    accelerate(model)
    assert model._modules.keys() == own._modules.keys()
    compare.compare(compare.values(own, X), compare.values(model, X), compare.truth(own, X)).require_near()


def _all_parts(m: Any, x: Tensor) -> Tensor:
    x = F.interpolate(x, scale_factor=2)
    for conv in m.convs:
        x = m.acts["e"](conv(x))
    x = m.layers(F.elu(m.other(x))) * m._gain * m.table["gain"] * getattr(m, "extra", 1.0)
    x = m.function(m.conv(x))
    return x if m.shift is None else x + m.shift


class _Half(nn.Conv2d):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) / 2


CHANGES: dict[str, Callable[[Any], object]] = {
    "list": lambda m: m.convs.__setitem__(0, nn.Conv2d(3, 3, 3, 2, 1)),
    "padding mode": lambda m: m.convs.__setitem__(1, nn.Conv2d(3, 3, 3, padding=1, padding_mode="reflect")),
    "dict": lambda m: m.acts.__setitem__("e", nn.ReLU()),
    "longer list": lambda m: m.convs.append(nn.Conv2d(3, 3, 3, padding=1)),
    "longer sequential": lambda m: m.layers.append(nn.Sigmoid()),
    "shorter sequential": lambda m: m.layers.__delitem__(3),
    "no module": lambda m: setattr(m, "convs", nn.ModuleList()),
    "patched layer": lambda m: setattr(m.convs[0], "forward", lambda x: 5 * x),
    "patched activation": lambda m: setattr(m.acts["e"], "forward", lambda x: 5 * x),
    "other class": lambda m: setattr(m.convs[0], "__class__", _Half),
    "underscore": lambda m: setattr(m, "_gain", 3.0),
    "in a dict": lambda m: m.table.update(gain=3.0),
    "function": lambda m: setattr(m, "function", torch.tanh),
    "added": lambda m: setattr(m, "extra", 3.0),
    "parameter": lambda m: setattr(m, "shift", nn.Parameter(torch.ones(1))),
    "number to parameter": lambda m: (delattr(m, "_gain"), setattr(m, "_gain", nn.Parameter(torch.tensor(1.0)))),
    "number to tensor": lambda m: setattr(m, "_gain", torch.ones(12)),
    "bias": lambda m: setattr(m.other, "bias", nn.Parameter(torch.ones(3))),
    "no bias": lambda m: setattr(m.convs[1], "bias", None),
    "alpha": lambda m: setattr(m.acts["e"], "alpha", 0.3),
    "hook": lambda m: m.convs[1].register_forward_hook(lambda *given: given[2] * 2),
    "pre-hook": lambda m: m.layers.register_forward_pre_hook(lambda module, given: (given[0] * 2,)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_changed_afterwards(change: str, compiled: bool) -> None:
    """Own weights in both copies, changed alike: the accelerated one must see it."""
    if compiled and "hook" in change:
        pytest.skip("torch.compile looks at hooks when it compiles, not afterwards")
    model = made(_all_parts)
    accelerate(model, example=X)
    assert len(model.fastbegan_report.replaced) == 6
    run: Any = torch.compile(model, backend="eager") if compiled else model
    before = run(X)
    own = restore(copy.deepcopy(model))
    torch.testing.assert_close(own(X), before)
    for one in (model, own):
        torch.manual_seed(1)
        CHANGES[change](one)
    with mock.patch.object(calls, "conv_stage", side_effect=calls.conv_stage) as counted:
        found, expected = run(X), own(X)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5 * float(expected.detach().abs().max()))
    if not compiled:
        assert counted.called and not model.fastbegan_report.breaks
        for output in (found, expected):
            output.sum().backward()
        for one, other in zip(model.parameters(), own.parameters(), strict=True):
            atol = 1e-5 * float(other.grad.abs().max()) if other.grad is not None else 0.0
            torch.testing.assert_close(one.grad, other.grad, rtol=1e-5, atol=atol)


def _reads_much(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * m.table["gain"] * getattr(m, "extra", 1.0) * (1.0 if m.shift is None else 2.0)


def test_a_copy_is_as_fast() -> None:
    model = accelerate(made(_reads_much))
    one = copy.deepcopy(copy.deepcopy(model))
    assert "forward" in vars(one) and one.forward.module is one
    with mock.patch.object(calls, "conv_stage", side_effect=calls.conv_stage) as counted:
        torch.testing.assert_close(one(X), restore(model)(X))  # and a warning would be an error
    assert counted.called


def test_hooks_and_patches_from_before_are_respected() -> None:
    model = made(_all_parts)
    model.acts["e"].forward = lambda x: 5 * x
    own = copy.deepcopy(model)
    accelerate(model)
    torch.testing.assert_close(model(X), own(X))
    assert model.fastbegan_report.replaced["convs.0"] == "nearest x2, 3x3 convolution 3 -> 3"
    seen: list[str] = []
    handle = nn.modules.module.register_module_forward_hook(lambda *given: seen.append(type(given[0]).__name__))
    try:
        torch.testing.assert_close(model(X), own(X))
    finally:
        handle.remove()
    assert seen[: len(seen) // 2] == seen[len(seen) // 2 :] and "Conv2d" in seen
    torch.testing.assert_close(model(X), own(X))


def test_what_is_left_is_not_looked_at_too_closely() -> None:
    """Spectral norm counts how often its weight is read."""
    norm = torch.nn.utils.parametrizations.spectral_norm
    model = nn.Sequential(norm(nn.Conv2d(3, 3, 5, padding=2)), nn.Conv2d(3, 3, 3, padding=1), nn.ELU())
    state = {name: value.clone() for name, value in model.state_dict().items()}
    accelerate(model)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_float64_stays_under_autocast() -> None:
    model = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ELU()).double()
    own = copy.deepcopy(model)
    accelerate(model)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(X.double()), own(X.double()))


class _Norm32(nn.GroupNorm):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input.float()).type(input.dtype)


def test_check_takes_ordinary_models() -> None:
    accelerate(nn.Sequential(_Norm32(1, 3), nn.SiLU(), nn.Conv2d(3, 3, 3, padding=1), nn.ELU()), check=X)
    first = nn.Sequential(nn.LeakyReLU(0.2, True), nn.Conv2d(3, 3, 3, padding=1), nn.ELU())
    assert "largest relative error" in str(accelerate(first, check=X).fastbegan_report)


def test_arguments_of_any_kind() -> None:
    def of_a_batch(m: Any, batch: Any) -> Tensor:
        return F.elu(m.conv(batch["x"]))

    model = accelerate(made(of_a_batch), check={"x": X})
    assert list(model.fastbegan_report.replaced) == ["conv"]


def test_check_says_where_nothing_fast_ran() -> None:
    with pytest.warns(UserWarning, match="no layer was put on the fast layers"):
        model = accelerate(nn.Sequential(nn.Conv2d(3, 3, 5), nn.ELU()), check=X)
    assert str(model.fastbegan_report).endswith("without fast layers 0.0e+00; no fast layer ran") or (
        "no fast layer ran" in str(model.fastbegan_report)
    )


def test_unpickled_it_is_followed_anew() -> None:
    fast = accelerate(_Pickled().eval())
    again = pickle.loads(pickle.dumps(fast)).train()
    with mock.patch.object(calls, "conv_stage", side_effect=calls.conv_stage) as counted:
        torch.testing.assert_close(again(X), type(again).forward(again, X))
    assert counted.call_count == 1


class _Pickled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if self.training and x.mean() > math.inf:
            return x
        return F.elu(self.conv(x))


def test_a_wrapped_forward_goes_back_too() -> None:
    model = accelerate(_Pickled().eval())
    fast = model.forward
    model.forward = lambda x: 2 * fast(x)
    restore(model)
    with mock.patch.object(calls, "conv_stage", side_effect=AssertionError):
        assert torch.equal(model(X), 2 * type(model).forward(model, X))


def test_exported_by_torch() -> None:
    model = accelerate(Interpolating().eval())
    x = images(2, 6, 4, 6)
    exported = torch.export.export(model, (x,))
    torch.testing.assert_close(exported.module()(x), model(x))


def _block() -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1), nn.ELU())


class _Penalised(nn.Module):
    """WGAN-GP's loss as a module: it differentiates inside of its forward."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, x: Tensor) -> Tensor:
        x = x.detach().requires_grad_()
        score = self.net(x)
        (slope,) = torch.autograd.grad(score, x, torch.ones_like(score), create_graph=True)
        return score.mean() + (slope.flatten(1).norm(dim=1) - 1).square().mean()


@pytest.mark.slow  # Dynamo takes twenty seconds for its second part
def test_a_forward_that_differentiates() -> None:
    own = _Penalised().double()
    model = accelerate(copy.deepcopy(own))
    for one in (own, model):
        one(X.double()).backward()
    for got, expected in zip(model.parameters(), own.parameters(), strict=True):
        torch.testing.assert_close(got.grad, expected.grad, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("idle", [False, True])
def test_a_class_that_changes_after_a_call(idle: bool) -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 3, 5 if idle else 3, padding=2 if idle else 1)

        def forward(self, x: Tensor) -> Tensor:
            return F.elu(self.conv(x))

    class Doubled(Net):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = accelerate(Net())
    before = model(X)
    model.__class__ = Doubled
    torch.testing.assert_close(model(X), 2 * before)
    Doubled.forward = lambda self, x: 3 * Net.forward(self, x)
    for _ in range(2):
        torch.testing.assert_close(model(X), 3 * before)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        traced: Any = torch.jit.trace(model, X)
        torch.testing.assert_close(traced(X), 3 * before)


def test_a_forward_of_somebodys_own_on_the_instance_stays() -> None:
    model: Any = nn.Sequential(_block(), _block())
    plain = model.forward
    model.forward = lambda x: 100 * plain(x)
    expected = model(X)
    accelerate(model)
    torch.testing.assert_close(model(X), expected, rtol=1e-4, atol=1e-4)
    assert list(model.fastbegan_report.replaced) == ["0.1", "1.1"]  # the inner ones are fast by themselves
    assert torch.equal(restore(model)(X), expected)


def _changes_its_output(model: Any) -> list[Tensor]:
    x = X.clone().requires_grad_()
    y = model(x)
    y.add_(1)
    y.data.mul_(2)
    return list(torch.autograd.grad(y.sum(), [x, *model.parameters()]))


def _changes_its_input(model: Any) -> list[Tensor]:
    x = X.clone()
    y = model(x)
    x.add_(2)
    x.data.mul_(3)
    return list(torch.autograd.grad(y.sum(), [*model.parameters()]))


def _of_inference(model: Any) -> list[Tensor]:
    with torch.inference_mode():
        x = X * 1
    return list(torch.autograd.grad(model(x).sum(), [*model.parameters()]))


@pytest.mark.parametrize("use", [_changes_its_output, _changes_its_input, _of_inference])
@pytest.mark.parametrize("activation", [nn.ELU(), nn.LeakyReLU(0.2), nn.SiLU()])
def test_a_caller_may_write_where_torch_lets_it(use: Callable[[Any], list[Tensor]], activation: nn.Module) -> None:
    own = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(3, 3, 3, padding=1), activation)
    model: Any = accelerate(copy.deepcopy(own))
    for got, expected in zip(use(model), use(own), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert model.fastbegan_report.replaced


@torch.library.custom_op("fastbegan_tests::write", mutates_args={"x"})
def _write(scale: float, x: Tensor) -> None:
    x.mul_(scale)


WRITES: dict[str, Callable[[Tensor], object]] = {
    "an overload": lambda x: torch.ops.aten.mul_.Tensor(x, torch.tensor(5.0)),
    "a list": lambda x: torch._foreach_mul_([x], 5.0),  # pyright: ignore
    "a tuple of outputs": lambda x: torch.sort(x + 1, 3, out=(x, torch.empty_like(x, dtype=torch.long))),
    "an op of the user's": lambda x: _write(5.0, x),
}


@pytest.mark.parametrize("name", WRITES)
def test_every_write_is_seen(name: str) -> None:
    def forward(m: Any, x: Tensor) -> Tensor:
        x = x * 1
        y = F.interpolate(x, scale_factor=2)
        WRITES[name](x)
        return m.act(m.conv(y))

    model = made(forward)
    own = copy.deepcopy(model)
    accelerate(model)
    with torch.no_grad():
        torch.testing.assert_close(model(X), own(X))


def test_a_gate_that_is_written_elsewhere_too() -> None:
    def forward(m: Any, x: Tensor) -> tuple[Tensor, Tensor]:
        y, kept = m.conv(x), torch.zeros(2, 3, 6, 6)
        return y * torch.sigmoid(y, out=kept), kept

    model = made(forward)
    own = copy.deepcopy(model)
    accelerate(model)
    with torch.no_grad():
        for got, expected in zip(model(X), own(X), strict=True):
            torch.testing.assert_close(got, expected)


def test_group_norm_without_an_epsilon_is_left() -> None:
    own = nn.Sequential(nn.GroupNorm(1, 3, eps=0.0), nn.SiLU())
    model: Any = accelerate(copy.deepcopy(own))
    torch.testing.assert_close(model(X), own(X))
    assert model.fastbegan_report.left == {"0": "its epsilon is 0.0"}


def test_what_torch_fx_made_and_makes() -> None:
    own = torch.fx.symbolic_trace(_block())
    model = accelerate(copy.deepcopy(own))
    torch.testing.assert_close(model(X), own(X))
    torch.testing.assert_close(torch.fx.symbolic_trace(accelerate(_block()))(X).shape, own(X).shape)
    torch.testing.assert_close(make_fx(model)(X)(X), own(X))


def test_a_model_whose_forward_is_no_method_gets_no_shell() -> None:
    class Inner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = nn.ELU()

        @staticmethod
        def forward(x: Tensor) -> Tensor:
            return 2 * x

    model = accelerate(nn.Sequential(_block(), Inner()))
    torch.testing.assert_close(model(X), 2 * model[0](X))


def test_buffers_that_a_forward_makes() -> None:
    class Grid(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _block()

        def forward(self, x: Tensor) -> Tensor:
            if "grid" not in self._buffers:
                self.register_buffer("grid", torch.ones(x.shape[2:]))
            return self.net(x * self.get_buffer("grid"))

    accelerate(Grid(), check=X)
    lazy = nn.Sequential(_block(), nn.LazyBatchNorm2d())
    accelerate(lazy, example=X)


def test_what_is_idle_looks_at_all_arguments_and_now_and_then_at_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    def least(chain: Any, channels_last: bool) -> str | None:
        return None if chains.example(chain.x).shape[2] > 6 else "too small"  # pyright: ignore

    def forward(m: Any, batch: Any) -> Tensor:
        return m.layers(batch["x"])

    monkeypatch.setattr(gains, "why_left", least)
    model = accelerate(made(forward))
    with mock.patch.object(calls, "conv_stage", side_effect=calls.conv_stage) as counted:
        model({"x": X})
        model({"x": X})
        assert not counted.called
        model({"x": images(2, 3, 8, 8)})
        assert counted.call_count == 1
        model.layers.insert(0, nn.Upsample(scale_factor=2))
        for _ in range(70):
            model({"x": X})
        assert counted.call_count > 1
