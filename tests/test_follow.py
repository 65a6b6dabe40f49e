"""The shell of an accelerated model: what Dynamo follows, how often, and what becomes of all else."""

from __future__ import annotations

import copy
import gc
import random
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

from fastbegan.convert import accelerate, calls, compare, follow, gains, restore
from tests.helpers.families import Interpolating, images, made, sequential

pytestmark = [pytest.mark.core, pytest.mark.usefixtures("take_all")]
X = images(2, 3, 6, 6)


@pytest.fixture
def stages() -> Iterator[mock.MagicMock]:
    """Counts the stages that run."""
    with mock.patch.object(calls, "conv_stage", side_effect=calls.conv_stage) as counted:
        yield counted


def _same(model: Any, own: Any, *given: Any, **named: Any) -> None:
    torch.manual_seed(4)
    expected = own(*given, **named)
    torch.manual_seed(4)
    torch.testing.assert_close(model(*given, **named), expected, rtol=1e-4, atol=1e-5)


def _net(inputs: int = 3) -> nn.Sequential:
    return nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(inputs, 4, 3, padding=1), nn.ELU())


def test_twenty_models_of_one_class_are_fast(stages: mock.MagicMock) -> None:
    for number in range(20):
        torch.manual_seed(number)
        model = Interpolating()
        own = copy.deepcopy(model)
        accelerate(model)
        stages.reset_mock()
        _same(model, own, images(2, 6, 4, 6))
        assert stages.call_count == 1, number


def test_twelve_variants_of_one_model_are_fast(stages: mock.MagicMock) -> None:
    own = _net()
    model = accelerate(copy.deepcopy(own))
    for size in (4, 5, 6):
        for batch in (1, 2):
            for grad in (True, False):
                x = images(batch, 3, size, size)
                stages.reset_mock()
                with torch.set_grad_enabled(grad):
                    _same(model, own, x)
                assert stages.call_count == 1, (size, batch, grad)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model(X), own(X), rtol=0.02, atol=0.02)
    _same(model.double(), own.double(), X.double())
    assert stages.call_count == 3


@pytest.mark.slow
def test_the_limit_of_variants_is_told(stages: mock.MagicMock, monkeypatch: pytest.MonkeyPatch) -> None:
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.name = _net(), ""

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x) * len(self.name)

    model = accelerate(Named())
    for number in range(follow.VARIANTS):
        model.name = "x" * number
        stages.reset_mock()
        _same(model, restore(copy.deepcopy(model)), X)
        assert stages.call_count == 1, number
    model.name = "y" * 99
    with pytest.warns(UserWarning, match=f"more than {follow.VARIANTS} variants"):
        model(X)
    _same(model, restore(copy.deepcopy(model)), X)


def test_a_forward_that_counts_is_not_followed_at_each_call(stages: mock.MagicMock) -> None:
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.calls, self.fade = _net(), 0, 1.0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            return self.net(x) * self.calls * self.fade

    model = accelerate(Counting())
    for number in range(1, follow.VARIANTS + 4):
        model.fade *= 0.9
        torch.testing.assert_close(model(X), model.net(X) * number * model.fade)
        assert model.calls == number
    assert stages.call_count == 2 * (follow.VARIANTS + 3)


def test_methods_and_inner_blocks_are_fast(stages: mock.MagicMock) -> None:
    class Coder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.SiLU(), _net(4))
            self.decoder = _net(4)

        def encode(self, x: Tensor) -> Tensor:
            return self.encoder(x)

        def decode(self, x: Tensor) -> Tensor:
            return self.decoder(x)

        def forward(self, x: Tensor) -> Tensor:
            return self.decode(self.encode(x))

    own = Coder()
    model = accelerate(copy.deepcopy(own))
    for name, x in (("encode", X), ("decode", images(2, 4, 6, 6)), ("forward", X)):
        stages.reset_mock()
        _same(getattr(model, name), getattr(own, name), x)
        assert stages.call_count == {"encode": 2, "decode": 1, "forward": 2}[name]  # the last two are one stage
    stages.reset_mock()
    _same(model.encoder[2], own.encoder[2], images(2, 4, 6, 6))
    assert stages.call_count == 1


def test_what_is_deleted_is_freed() -> None:
    model = accelerate(nn.Sequential(_net(), nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.ELU())))
    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            model(X)
    model[0](X)
    seen = [weakref.ref(module) for module in model.modules()] + [weakref.ref(value) for value in model.parameters()]
    del model
    gc.collect()
    assert not any(reference() is not None for reference in seen)


class _Recomputing(nn.Module):
    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.block = nn.Sequential(_net(), nn.Dropout(0.5), nn.Conv2d(4, 3, 3, padding=1), nn.ReLU())
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Any:
        return checkpoint(self.block, x, use_reentrant=self.reentrant) * 2  # pyright: ignore


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.filterwarnings("ignore:.*use_reentrant:UserWarning")
def test_gradient_checkpointing_is_entered_and_stays(reentrant: bool, stages: mock.MagicMock) -> None:
    """Fast inside, with one draw of the dropout for both passes, and with nothing kept but the input."""
    own = _Recomputing(reentrant)
    model = accelerate(copy.deepcopy(own))
    results, kept = [], []
    for one in (own, model):
        saved: list[Tensor] = []
        x = X.clone().requires_grad_()
        torch.manual_seed(1)
        pack = lambda value, saved=saved: saved.append(value) or value  # noqa: E731
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda value: value):
            y = one(x)
        kept.append(sum(value.numel() for value in saved if not isinstance(value, nn.Parameter)))
        torch.manual_seed(2)
        y.square().sum().backward()
        results.append((y, x.grad, *(parameter.grad for parameter in one.parameters())))
    for got, expected in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert kept[1] <= kept[0]
    if not reentrant:  # Dynamo does not enter the other kind; its inner modules are fast by their own shells
        assert stages.call_count == 4


def test_a_users_error_is_the_users_own() -> None:
    class Strict(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = _net()

        def forward(self, x: Tensor) -> Tensor:
            if x.shape[0] > 2:
                raise KeyError("a batch of at most two")
            return self.net(x)

    model: Any = accelerate(Strict())
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 5 channels"):
        model(images(2, 5, 4, 4))
    with pytest.raises(KeyError, match="a batch of at most two"):
        model(images(3, 3, 4, 4))
    with pytest.raises(TypeError, match="missing 1 required positional argument"):
        model()
    model(X)
    assert list(model.fastbegan_report.replaced) == ["net.1"] and not any(
        "Error" in reason for reason in model.fastbegan_report.breaks
    )


def test_where_dynamo_fails_the_own_forward_runs_and_the_report_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    own = _net()
    model = accelerate(copy.deepcopy(own))

    def fails(*_: object, **__: object) -> None:
        raise ArithmeticError("of a graph that nobody expected")

    monkeypatch.setattr("fastbegan.convert.shell.rewrite", fails)
    _same(model, own, X)
    assert "of a graph that nobody expected" in str(model.fastbegan_report)


Forward = Callable[[Any, Tensor], Any]


def _freezes(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.layers(x)
    return y + m.layers(x)


def _half_frozen(m: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        y = m.up(x)
    return m.act(m.conv(y))


def _casts(m: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return m.layers(x).float()


def _remembers(m: Any, x: Tensor) -> Tensor:
    m.kept.append(1)
    return m.layers(x) * len(m.kept)


def _reads_a_config(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * m.config.gain


def _counts_inside(m: Any, x: Tensor) -> Tensor:
    m.table["counts"]["calls"] += 1
    return m.layers(x) * m.table["counts"]["calls"]


def _asks(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) if torch.is_grad_enabled() else 2 * m.layers(x)


def _asks_for_the_type(m: Any, x: Any) -> Tensor:
    return m.layers(x) if isinstance(x, Tensor) else m.layers(x[0])


def _draws(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) if random.random() < 0.5 else 2 * m.layers(x)


def _draws_by_torch(m: Any, x: Tensor) -> Tensor:
    return m.layers(x) * (1.0 if torch.rand(1).item() < 0.5 else 2.0)


def _breaks_in_between(m: Any, x: Tensor) -> Tensor:
    y = F.interpolate(x, scale_factor=2)
    torch._dynamo.graph_break()
    y = m.conv(y)
    torch._dynamo.graph_break()
    return m.layers(m.act(y))


def _swish(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    return y * torch.sigmoid(y)


def _no_swish(m: Any, x: Tensor) -> Tensor:
    y = m.conv(x)
    gate = torch.sigmoid(y)
    y.mul_(2)
    return y * gate


def _doubled_by_size(m: Any, x: Tensor) -> Tensor:
    return m.act(m.conv(F.interpolate(x, size=(2 * x.shape[2], 2 * x.shape[3]))))


@pytest.mark.parametrize(
    ("forward", "count"),
    [
        (_freezes, 2),
        (_half_frozen, 1),
        (_casts, 1),
        (_remembers, 1),
        (_reads_a_config, 1),
        (_counts_inside, 1),
        (_asks, 1),
        (_asks_for_the_type, 1),
        (_draws, 1),
        (_draws_by_torch, 1),
        (_breaks_in_between, 1),
        (_swish, 1),
        (_no_swish, 0),
        (_doubled_by_size, 1),
    ],
)
def test_forwards_of_all_kinds(forward: Forward, count: int, stages: mock.MagicMock) -> None:
    """Three calls, the third with the model changed: the same values, gradients and side effects, and fast."""
    model = made(forward)
    own = copy.deepcopy(model)
    accelerate(model)
    for call in range(3):
        if call == 2:
            model.config.gain = own.config.gain = 3.0
        stages.reset_mock()
        random.seed(call)
        before, exact = compare.values(own, X), compare.truth(own, X)
        for one in (model, own):
            one.table["counts"]["calls"], one.kept = call, type(one.kept)([1] * call)
        random.seed(call)
        first = compare.values(own, X)
        random.seed(call)
        got = compare.values(model, X)
        if forward in (_counts_inside, _remembers):
            exact = {}
        if forward is not _casts:
            compare.compare(first, got, {} if forward in (_draws,) else exact if before.keys() else {}).require_near()
        assert stages.call_count == count
        assert model.table == own.table and model.kept == own.kept


def test_under_a_dispatch_mode_the_own_forward_runs(stages: mock.MagicMock) -> None:
    own = _net()
    model = accelerate(copy.deepcopy(own))
    counts = []
    for one in (model, own):
        with FlopCounterMode(display=False) as counter:
            one(X)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] and not stages.called


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:FutureWarning")  # torch.func's own
def test_inference_mode_and_functions_of_the_module(stages: mock.MagicMock) -> None:
    own = _net()
    model = accelerate(copy.deepcopy(own))
    with torch.inference_mode():
        _same(model, own, X)
    assert stages.call_count == 1
    values = {name: 0.5 * value for name, value in own.state_dict().items()}
    _same(
        lambda x: torch.func.functional_call(model, values, (x,)),
        lambda x: torch.func.functional_call(own, values, (x,)),
        X,
    )
    assert stages.call_count == 2

    def loss(module: nn.Module) -> Callable[[dict[str, Tensor]], Tensor]:
        return lambda values: torch.func.functional_call(module, values, (X,)).square().sum()

    got, expected = torch.func.grad(loss(model))(values), torch.func.grad(loss(own))(values)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, rtol=1e-4, atol=1e-4)
    tangent = torch.ones_like(X)
    got, expected = (torch.func.jvp(one, (X,), (tangent,)) for one in (model, own))
    torch.testing.assert_close(got, expected)
    assert torch.func.vmap(model)(X[None]).shape == (1, 2, 4, 12, 12)


def test_frozen_parameters_and_a_new_dtype(stages: mock.MagicMock) -> None:
    own = _net()
    model = accelerate(copy.deepcopy(own))
    model(X)
    for one in (model, own):
        one.requires_grad_(False)
    x = X.clone().requires_grad_()
    got, expected = (torch.autograd.grad(one(x).sum(), x)[0] for one in (model, own))
    torch.testing.assert_close(got, expected)
    assert stages.call_count == 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")  # Inductor's
def test_compiled_by_inductor(stages: mock.MagicMock) -> None:
    own = sequential()
    model = accelerate(copy.deepcopy(own), compile=True)
    x = images(3, 6)
    before, exact = compare.values(own, x), compare.truth(own, x)
    compare.compare(before, compare.values(model, x), exact).require_near()
    model(x)
    traced = stages.call_count
    model(x)
    assert stages.call_count == traced  # what Inductor made runs, not the calls
    with torch.no_grad():
        torch.testing.assert_close(model(x), own(x), rtol=1e-4, atol=1e-5)


def test_threads_do_not_meet() -> None:
    """Four accelerate and call their own model while another one runs an unrelated one."""
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
        own: Any = Interpolating()
        model: Any = accelerate(copy.deepcopy(own))
        for size in (4, 6):
            _close(model(images(2, 6, size, size)), own(images(2, 6, size, size)))
        assert len(model.fastbegan_report.replaced) == 4, model.fastbegan_report

    runner = threading.Thread(target=guarded(runs))
    runner.start()
    workers = [threading.Thread(target=guarded(follows)) for _ in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    done.set()
    runner.join()
    assert not errors, errors[0]


def _close(got: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


def test_a_users_own_settings_of_dynamo_stay() -> None:
    config = torch._dynamo.config
    before = (config.recompile_limit, config.suppress_errors, config.skip_nnmodule_hook_guards)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        accelerate(_net())(X)
        assert ("error", None, Warning, None, 0) in warnings.filters
        assert ("ignore", None, Warning, None, 0) not in warnings.filters
    assert (config.recompile_limit, config.suppress_errors, config.skip_nnmodule_hook_guards) == before


def test_a_warning_of_ours_while_dynamo_works_reaches_the_user(monkeypatch: pytest.MonkeyPatch) -> None:
    """As that of a kernel which is not used; it is given once in a process, so it must not be lost."""

    def warns(*_: object) -> None:
        warnings.warn("a kernel is not used", RuntimeWarning, stacklevel=2)

    monkeypatch.setattr(gains, "why_left", warns)
    with pytest.warns(RuntimeWarning, match="a kernel is not used"):
        accelerate(_net())(X)
