"""accelerate and restore: the same model, faster; what cannot be taken is left, and nothing changes silently."""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastbegan.convert import Report, accelerate, calls, compare, restore
from tests.helpers.families import FAMILIES, Interpolating, Latent, images, sequential
from tests.helpers.gans import seeded

EVERY = pytest.mark.parametrize("family", FAMILIES)
SOME = pytest.mark.parametrize(
    "family",
    [name if name in ("latent", "sequential") else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES],
)
pytestmark = [
    pytest.mark.core,
    pytest.mark.usefixtures("take_all"),
]


def _made(family: str) -> tuple[nn.Module, Tensor, int]:
    make, shape, taken = FAMILIES[family]
    torch.manual_seed(0)
    return make(), images(*shape), taken


def _report(model: nn.Module) -> Report:
    report = model.fastbegan_report
    assert isinstance(report, Report)
    return report


@EVERY
@pytest.mark.parametrize("training", [True, False])
def test_outputs_and_gradients_are_the_same(family: str, training: bool) -> None:
    model, x, taken = _made(family)
    model.train(training)
    before, exact, words = compare.values(model, x), compare.truth(model, x), repr(model)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    parameters = dict(model.named_parameters())
    assert accelerate(model, check=x) is model
    assert len(_report(model).replaced) == taken, str(_report(model))
    compare.compare(before, compare.values(model, x), exact).require_near()
    assert repr(model) == words and type(model) is type(_made(family)[0])
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(one is parameters[name] for name, one in model.named_parameters())
    restore(model)
    after = compare.values(model, x)
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert "forward" not in vars(model) and "fastbegan_report" not in vars(model)


@SOME
def test_an_optimizer_made_before_goes_on(family: str) -> None:
    ways = {}
    for fast in (False, True):
        model, x, _ = _made(family)
        model.double()
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        if fast:
            accelerate(model)
        for _ in range(3):
            optimizer.zero_grad()
            output = model(x.double())
            (output["image"] if isinstance(output, dict) else output).square().mean().backward()
            optimizer.step()
        ways[fast] = model.state_dict()
    for name, value in ways[False].items():
        torch.testing.assert_close(ways[True][name], value, rtol=1e-6, atol=1e-9)


@SOME
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # Dynamo looks at inputs
def test_torch_compile_takes_it_whole(family: str) -> None:
    model, x, _ = _made(family)
    before, exact = compare.values(model, x), compare.truth(model, x)
    accelerate(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = compare.values(compiled, x)
    named = {name.replace("_orig_mod.", ""): value for name, value in found.items()}
    compare.compare(before, named, exact).require_near()


@SOME
def test_copies_and_pickles_are_whole(family: str) -> None:
    model, x, taken = _made(family)
    accelerate(model)
    values = compare.values(model, x)
    copies = [copy.deepcopy(model)]
    if family != "reparametrised":  # which torch does not pickle
        file = io.BytesIO()
        torch.save(model, file)
        file.seek(0)
        copies += [pickle.loads(pickle.dumps(model)), torch.load(file, weights_only=False)]
    for one in copies:
        assert one is not model and len(_report(one).replaced) == taken
        found = compare.values(one, x)
        assert all(torch.equal(found[name], value) for name, value in values.items())
        with torch.no_grad():
            for parameter in one.parameters():
                parameter.add_(1.0)
        assert not torch.equal(compare.values(one, x)["output 0"], values["output 0"])  # its own weights
        restore(one)
    assert torch.equal(compare.values(model, x)["output 0"], values["output 0"])


def test_autocast_and_functional_call() -> None:
    model, x, _ = _made("sequential")
    values = {name: 0.5 * value for name, value in model.state_dict().items()}
    before = torch.func.functional_call(model, values, (x,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = model(x)
    accelerate(model)
    torch.testing.assert_close(torch.func.functional_call(model, values, (x,)), before)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = model(x)
    assert found.dtype == half.dtype
    torch.testing.assert_close(found, half, atol=0.02, rtol=0.02)


def test_the_report_says_what_and_why() -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 4, 5, padding=2),
        nn.ELU(),
        nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect"),
        nn.ReLU(),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Upsample(scale_factor=3),
        nn.Conv2d(4, 4, 3, padding=1),
        nn.Conv2d(4, 4, 3, padding=1, groups=2),
        nn.ELU(),
        nn.Conv2d(4, 4, 3, padding=2, dilation=2),
        nn.ELU(),
        nn.ConvTranspose2d(4, 4, 4, 2, 1),
        nn.ELU(),
        nn.Conv2d(4, 4, 3),
        nn.ELU(),
        nn.ZeroPad2d(1),
        nn.Conv2d(4, 4, 3),
        nn.SiLU(),
        nn.Conv2d(4, 4, 1),
        nn.LeakyReLU(),
    )
    x = images(1, 3, 8, 8)
    report = _report(accelerate(model, check=x))
    assert report.replaced == {
        "17": "3x3 convolution 4 -> 4, silu",
        "19": "1x1 convolution 4 -> 4, leaky_relu",
    }
    assert report.left == {
        "0": "its kernel is 5x5",
        "2": "its padding is reflect",
        "5": "the upsampling before it is bilinear",
        "7": "the upsampling before it is not by a factor of 2",
        "8": "it is dilated or in groups",
        "10": "it is dilated or in groups",
        "12": "a transposed convolution",
        "14": "no fast layer has stride (1, 1) and padding (0, 0)",
    }
    assert report.pairs == {"up": {}, "activation": {"17": True, "19": True}, "norm": {}} and not report.breaks
    assert "2 of 2 convolution to activation; checked: largest relative error" in str(report)


def test_a_convolution_without_activation_goes_with_the_layer_before_it() -> None:
    """As one stage of several activations, if they take one alpha; behind nothing there is nothing to gain."""
    up = (nn.Upsample(scale_factor=2), nn.Conv2d(4, 17, 3, padding=1), nn.LeakyReLU(0.2))
    ends = (nn.Conv2d(17, 17, 3, padding=1), nn.ReLU(), nn.Conv2d(17, 5, 3, padding=1), nn.Tanh())
    alone = (nn.Conv2d(5, 17, 3, padding=1), nn.Conv2d(17, 5, 1))
    elus = [(nn.Conv2d(5, 5, 3, padding=1), nn.ELU(alpha)) for alpha in (0.5, 2.0)]
    model = nn.Sequential(*up, *ends, *alone, *elus[0], *elus[1])
    with mock.patch.object(calls, "conv_stage", side_effect=calls.conv_stage) as counted:
        accelerate(model, check=images(2, 4, 4, 4))
        counted.reset_mock()
        model(images(2, 4, 4, 4))
    assert _report(model).replaced["5"] == "3x3 convolution 17 -> 5" and counted.call_count == 3
    assert _report(model).left == dict.fromkeys(
        ("7", "8"), "it has neither an upsampling before nor an activation behind it"
    )


@pytest.mark.parametrize("odd", [False, True])
def test_padding_at_the_end(odd: bool) -> None:
    model = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(3, 4, 3, stride=2), nn.SiLU())
    accelerate(model, check=images(2, 3, 7 + odd, 8))
    assert _report(model).replaced == {"1": "3x3 convolution 3 -> 4, stride 2, silu"}


def test_batch_norm_is_left_where_it_is() -> None:
    model, x, _ = _made("normalised")
    other = copy.deepcopy(model)
    accelerate(model)
    for one in (model, other):
        one.train()
        one(x)
        one.eval()
    torch.testing.assert_close(model(x), other(x))
    for (name, value), expected in zip(model.named_buffers(), other.buffers(), strict=True):
        torch.testing.assert_close(value, expected, msg=name)


def test_norms_by_hooks_are_followed() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        conv = torch.nn.utils.weight_norm(nn.Conv2d(3, 3, 3, padding=1))
    model = nn.Sequential(conv, nn.ELU(), nn.Conv2d(3, 3, 3, padding=1), nn.ELU())
    accelerate(model, check=images(1, 3, 4, 4))
    assert not _report(model).left and list(_report(model).replaced) == ["0", "2"]


class _Shared(nn.Module):
    """One convolution three times, under two names, with one upsampling and one activation for all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = self.alias = nn.Conv2d(4, 4, 3, padding=1)
        self.up, self.act = nn.Upsample(scale_factor=2), nn.ELU()

    def forward(self, x: Tensor) -> Tensor:
        x = self.act(self.conv(self.up(x)))
        return self.conv(self.act(self.alias(x))) + self.up(self.up(x)).mean()


def test_shared_modules() -> None:
    model = _Shared()
    accelerate(model, check=images(2, 4, 4, 4))
    assert list(_report(model).replaced) == ["conv"] and set(_report(model).left) <= {"alias"}


class _Parts(nn.Module):
    """A forward that branches, around parts that do not."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ELU(), nn.Conv2d(4, 4, 3, padding=1), nn.ELU())
        self.decoder = Interpolating()
        self.project = nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        x = F.elu(self.project(self.encoder(x)))
        return self.decoder(x) if x.mean() > -10 else x


def test_a_forward_that_branches_on_values_is_followed_in_parts() -> None:
    model = _Parts()
    accelerate(model, check=images(2, 3, 8, 8))
    decoder = ("decoder.last", *(f"decoder.convs.{number}" for number in range(3)))
    assert set(_report(model).replaced) == {"encoder.0", "encoder.2", "project", *decoder}
    restore(model)
    assert not any("forward" in vars(module) for module in model.modules())


class _Switch(nn.Module):
    """A forward that depends on training, on an attribute, and on an optional argument."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.gain = nn.Conv2d(3, 3, 3, padding=1), 1.0

    def forward(self, x: Tensor, skip: Tensor | None = None, *, twice: bool = False) -> Tensor:
        x = F.elu(self.conv(F.interpolate(x, scale_factor=2))) * self.gain
        x = F.dropout(x, 0.5, self.training)
        x = x if skip is None else x + skip
        return 2 * x if twice else x


def test_the_model_is_followed_as_it_is_at_each_call() -> None:
    """With other arguments, modes, attributes and layers, and fast in each of them."""
    model, x = _Switch().eval(), images(2, 3, 4, 4)
    own = copy.deepcopy(model)
    accelerate(model, check=x)
    skip = images(2, 3, 8, 8)
    with mock.patch.object(calls, "conv_stage", side_effect=calls.conv_stage) as counted:
        torch.testing.assert_close(model(x=x), own(x=x))
        for arguments, named in (((x, skip), {}), ((x,), {"skip": skip}), ((x,), {"twice": True})):
            torch.testing.assert_close(copy.deepcopy(model)(*arguments, **named), own(*arguments, **named))
        assert counted.call_count == 4
        for change in (
            lambda one: setattr(one, "gain", 3.0),
            lambda one: one.train(),
            lambda one: setattr(one, "conv", nn.Conv2d(3, 3, 3, padding=1)),
            lambda one: setattr(one.conv, "stride", (2, 2)),
        ):
            one, other = copy.deepcopy(model), copy.deepcopy(own)
            one(x)
            counted.reset_mock()
            torch.manual_seed(3)
            change(one)
            torch.manual_seed(3)
            change(other)
            torch.manual_seed(4)
            expected = other(x)
            torch.manual_seed(4)
            torch.testing.assert_close(one(x), expected)
            assert counted.call_count == 1


def _doubled(values: Any) -> Any:
    return tuple(None if value is None else 2 * value for value in values)


@pytest.mark.parametrize("place", ["", "block", "block.0"])
@pytest.mark.parametrize("kind", ["forward", "pre", "backward", "backward pre"])
def test_hooks_fire_that_are_registered_late(place: str, kind: str) -> None:
    """On the root, a container and a leaf, and a hook that changes what it is given does so."""
    block = nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ELU())
    model: Any = nn.Sequential()
    model.add_module("up", nn.Upsample(scale_factor=2))
    model.add_module("block", block)
    own, x = copy.deepcopy(model), images(1, 3, 4, 4)
    accelerate(model)(x)
    results, fired = [], []
    for one in (model, own):
        module, seen = one.get_submodule(place), []
        fired.append(seen)
        if kind == "forward":
            handle = module.register_forward_hook(lambda *given, seen=seen: seen.append(1) or given[2] * 2)
        elif kind == "pre":
            handle = module.register_forward_pre_hook(lambda m, given, seen=seen: seen.append(1) or _doubled(given))
        elif kind == "backward":
            handle = module.register_full_backward_hook(lambda *given, seen=seen: seen.append(1) or _doubled(given[1]))
        else:
            handle = module.register_full_backward_pre_hook(
                lambda m, given, seen=seen: seen.append(1) or _doubled(given)
            )
        leaf = x.clone().requires_grad_()
        y = one(leaf)
        results.append((y, *torch.autograd.grad(y.sum(), [leaf, *one.parameters()])))
        handle.remove()
        results[-1] += (one(x),)
    assert fired[0] == fired[1] == [1]
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected)


def test_wrong_use_is_refused() -> None:
    model = accelerate(sequential())
    for one in (model, nn.Sequential(model)):
        with pytest.raises(
            RuntimeError, match=r"\(Sequential\) is accelerated already; restore\(model\) takes that back"
        ):
            accelerate(one)
    with pytest.raises(TypeError, match=r"model is a dict; accepted: an nn\.Module"):
        accelerate({})  # pyright: ignore[reportArgumentType]
    with pytest.raises(
        RuntimeError, match=r"the model .OptimizedModule. is compiled already; accelerate the model first"
    ):
        accelerate(torch.compile(sequential()))  # pyright: ignore[reportArgumentType]
    lazy = nn.Sequential(nn.LazyConv2d(3, 3, padding=1), nn.ELU(), nn.Conv2d(3, 3, 3, padding=1), nn.ELU())
    accelerate(lazy)
    for _ in range(2):
        assert lazy(images(1, 5, 4, 4)).shape == (1, 3, 4, 4)  # it finds its size
    assert set(_report(lazy).replaced) == {"0", "2"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        quantised = nn.Sequential(torch.ao.nn.quantized.Conv2d(3, 3, 3, padding=1), nn.ReLU())
        accelerate(quantised)
    assert "quantized.modules.conv.Conv2d" in _report(quantised).left["0"]


def test_a_failed_check_restores(monkeypatch: pytest.MonkeyPatch) -> None:
    real = calls.conv_stage
    monkeypatch.setattr(calls, "conv_stage", lambda *args, **options: 1.0001 * real(*args, **options))
    model, x, _ = _made("latent")
    with pytest.raises(RuntimeError, match=r"the check failed: the error of output 0 is .* the model was restored"):
        accelerate(model, check=x)
    assert "forward" not in vars(model) and "fastbegan_report" not in vars(model)


@pytest.mark.parametrize("name", ["f-AnoGAN's discriminator", "BEGAN's discriminator", "EBGAN's discriminator"])
def test_gradient_penalties(name: str) -> None:
    """WGAN-GP's and R1's: a gradient's size, differentiated, with no switch thrown."""
    plain, x = seeded(name, 0)
    plain, x = plain.double(), x.double()
    fast = accelerate(copy.deepcopy(plain))
    found = []
    for model in (plain, fast):
        leaf = x.detach().requires_grad_()
        output = model(leaf)
        output = output[0] if isinstance(output, tuple) else output
        (slope,) = torch.autograd.grad(output.sum(), leaf, create_graph=True)
        penalty = (slope.flatten(1).norm(dim=1) - 1).square().mean()
        wanted = dict(model.named_parameters())
        gradients = torch.autograd.grad(penalty, list(wanted.values()), allow_unused=True)
        found.append({key: value for key, value in zip(wanted, gradients, strict=True) if value is not None})
    assert found[0].keys() == found[1].keys() and len(found[0]) > 2
    largest = max(float(value.abs().max()) for value in found[0].values())  # a bias before a norm has no gradient
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, rtol=1e-8, atol=1e-12 * largest, msg=key)


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::FutureWarning")
def test_a_traced_model_can_be_saved() -> None:
    model, x, _ = _made("interpolating")  # the sequential one has nn.ELU(True), which torch itself cannot save
    expected = model(x)
    traced = torch.jit.trace(accelerate(model), x)
    file = io.BytesIO()
    torch.jit.save(traced, file)
    file.seek(0)
    torch.testing.assert_close(torch.jit.load(file)(x), expected)


def test_what_the_layers_do_not_take_runs_as_before() -> None:
    model = Latent().double()
    accelerate(model, check=images(1, 3, 8, 8).double())
    conv = accelerate(nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.ELU()))
    one = images(3, 4, 4)
    torch.testing.assert_close(conv(one), F.elu(conv[0](one)))
    with pytest.raises(RuntimeError):  # in torch's own words
        conv(one.half())


def test_a_compiled_model_notices_too() -> None:
    model, x = _Switch().eval(), images(2, 3, 4, 4)
    own = copy.deepcopy(model)
    accelerate(model)
    compiled: Any = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(x), own(x))
    for one in (model, own):
        one.gain = 3.0
    torch.testing.assert_close(compiled(x), own(x))
    for one in (model, own):
        one.gain, one.conv = 1.0, own.conv
    torch.testing.assert_close(compiled(x), own(x))
