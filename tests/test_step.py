"""One step: what it changes, what it must not change, and that it learns."""

from __future__ import annotations

import copy
import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.counts import OperationCount
from fastbegan import ModelConfig, TrainConfig, TrainStep, UserError
from fastbegan.data.faces import faces
from fastbegan.nets.models import build
from fastbegan_kernels import normalize_images

pytestmark = pytest.mark.core
MODEL = ModelConfig(size=32, filters=4, hidden=8, latent=8)
TRAIN = TrainConfig(batch_size=4, lr=1e-3)


def _step(train: TrainConfig = TRAIN, model: ModelConfig = MODEL, dtype: torch.dtype | None = None) -> TrainStep:
    return TrainStep(*build(model, seed=0), train, dtype)


def _batch(count: int = 4, latent: int = 8) -> tuple[Tensor, Tensor]:
    return normalize_images(faces(torch.arange(count), 32)), torch.rand(count, latent) * 2 - 1


def _weights(step: TrainStep) -> list[Tensor]:
    nets = (step.generator, step.discriminator, step.average)
    return [p.detach().clone() for net in nets for p in net.parameters()]


def test_overfits_sixteen_images() -> None:
    step = _step(replace(TRAIN, batch_size=16), ModelConfig(size=16, filters=8, widths=(1, 2)))
    real, z = normalize_images(faces(torch.arange(16), 16)), torch.rand(16, 64) * 2 - 1
    step(real, z, z)
    first = step.equilibrium.read()["loss_real"]
    for number in range(2, 101):
        step(real, z, z)
        if number == 90:
            step.equilibrium.read()
    assert step.equilibrium.read()["loss_real"] < 0.5 * first


@pytest.mark.parametrize("updates", ["simultaneous", "alternating"])
@pytest.mark.parametrize("latents", ["shared", "independent"])
def test_every_mode_moves_everything(updates: str, latents: str) -> None:
    step = _step(replace(TRAIN, updates=updates, latents=latents))
    before = _weights(step)
    real, z = _batch()
    step(real, z, z if latents == "shared" else -z)
    assert all(not torch.equal(a, b) for a, b in zip(before, _weights(step), strict=True))
    assert step.equilibrium.k.item() != 0 and step.found_bad.item() == 0


def test_alternating_generator_sees_the_updated_discriminator() -> None:
    real, z = _batch()
    steps = {mode: _step(replace(TRAIN, updates=mode)) for mode in ("simultaneous", "alternating")}
    for step in steps.values():
        step(real, z, z)
    both = list(steps.values())
    for name, value in both[0].discriminator.state_dict().items():  # the first update of D is the same
        torch.testing.assert_close(value, both[1].discriminator.state_dict()[name])
    reference = _step()
    reference.discriminator.load_state_dict(both[1].discriminator.state_dict())
    (expected,) = reference.objective.for_generator(z)
    row = both[1].equilibrium.read()
    assert row["loss_fake"] == pytest.approx(expected.item(), rel=1e-6)
    assert row["loss_fake"] != both[0].equilibrium.read()["loss_fake"]


@pytest.mark.parametrize("updates", ["simultaneous", "alternating"])
@pytest.mark.parametrize("where", ["image", "latent", "k", "generator gradient", "discriminator gradient"])
def test_nan_stops_before_the_weights_change(where: str, updates: str) -> None:
    step = _step(replace(TRAIN, updates=updates))
    real, z = _batch()
    step(real, z, z)
    if where == "image":
        real = real.clone()
        real[0, 0, 0, 0] = float("nan")
    elif where == "latent":
        z = z.clone()
        z[0, 0] = float("inf")
    elif where == "k":
        step.equilibrium.k.fill_(float("nan"))
    else:
        net = step.generator if where == "generator gradient" else step.discriminator
        next(net.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    if updates == "alternating" and where == "generator gradient":
        net = step.generator  # D's own update is sound and comes first
        before = [p.detach().clone() for p in net.parameters()]
        step(real, z, z)
        after = [p.detach() for p in net.parameters()]
    else:
        before = _weights(step)
        moments = copy.deepcopy(step.optimizer_d.state_dict()["state"])
        step(real, z, z)
        after = _weights(step)
        for number, state in step.optimizer_d.state_dict()["state"].items():
            assert all(torch.equal(state[name], moments[number][name]) for name in state)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert step.found_bad.item() == 1 and step.bad_step.item() == 2
    step(*_batch(), z)  # nothing moves afterwards either, and the first bad step is remembered
    assert step.bad_step.item() == 2


def test_sound_steps_are_not_held_back_by_the_check() -> None:
    plain, checked = _step(), _step()
    real, z = _batch()
    checked(real, z, z)
    plain.objective.for_both(real, z, z)
    for net in (plain.discriminator, plain.generator):
        torch.optim.Adam(net.parameters(), lr=TRAIN.lr).step()
    for a, b in ((plain.generator, checked.generator), (plain.discriminator, checked.discriminator)):
        for p, q in zip(a.parameters(), b.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


def test_average_follows_by_half_life() -> None:
    step = _step(replace(TRAIN, ema_half_life=8.0))
    real, z = _batch()
    step.average.load_state_dict({name: torch.zeros_like(v) for name, v in step.average.state_dict().items()})
    images = 10_000  # long after the ramp
    step.number.fill_(images // 4 - 1)
    step(real, z, z)
    for average, weight in zip(step.average.parameters(), step.generator.parameters(), strict=True):
        torch.testing.assert_close(average, (1 - 0.5 ** (4 / 8)) * weight.detach())


def test_no_average_follows_at_once() -> None:
    step = _step(replace(TRAIN, ema_half_life=0.0))
    real, z = _batch()
    step(real, z, z)
    for average, weight in zip(step.average.parameters(), step.generator.parameters(), strict=True):
        torch.testing.assert_close(average, weight.detach())


def test_learning_rate_takes_effect() -> None:
    step = _step()
    step.set_lr(0.0)
    before = _weights(step)
    real, z = _batch()
    step(real, z, z)
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(step), strict=True))


def test_carry_fades() -> None:
    step = _step(replace(TRAIN, carry_steps=10), replace(MODEL, vanishing=True))
    real, z = _batch()
    seen = []
    for number in (1, 6, 11, 20):
        step.number.fill_(number - 1)
        step(real, z, z)
        assert step.generator.carry is not None and step.average.carry is not None
        assert step.generator.carry.item() == step.average.carry.item()
        seen.append(round(step.generator.carry.item(), 6))
    assert seen == [1.0, 0.5, 0.0, 0.0]


def test_bf16_step_stays_near_float32() -> None:
    real, z = _batch()
    rows = []
    for dtype in (None, torch.bfloat16):
        step = _step(dtype=dtype)
        for _ in range(20):
            step(real, z, z)
        assert step.found_bad.item() == 0
        assert all(p.dtype == torch.float32 for p in step.parameters())
        rows.append(step.equilibrium.read())
    assert rows[1]["loss_real"] == pytest.approx(rows[0]["loss_real"], rel=0.03)


def test_fp16_overflow_is_skipped_and_scaled_down() -> None:
    step = _step()
    step.dtype = torch.float16  # the bookkeeping alone: CPUs have no fp16 convolutions worth using
    step.loss_scale.fill_(scale := 1024.0)
    handle = next(step.generator.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    before = [p.detach().clone() for p in step.generator.parameters()]
    real, z = _batch()
    step(real, z, z)
    assert step.found_bad.item() == 0 and step.loss_scale.item() == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, step.generator.parameters(), strict=True))
    handle.remove()
    step(real, z, z)
    assert not torch.equal(before[0], next(step.generator.parameters()))


def test_fp16_that_overflows_at_every_scale_is_bad() -> None:
    step = _step()
    step.dtype = torch.float16
    step.loss_scale.fill_(4.0)
    next(step.discriminator.parameters()).register_hook(lambda gradient: gradient * float("nan"))
    real, z = _batch()
    before = _weights(step)
    for _ in range(5):
        step(real, z, z)
    assert step.found_bad.item() == 1 and step.bad_step.item() == 3
    assert all(torch.equal(a, b) for a, b in zip(before, _weights(step), strict=True))


def test_fp16_overflow_in_either_player_scales_down() -> None:
    step = _step(replace(TRAIN, updates="alternating"))
    step.dtype = torch.float16
    step.loss_scale.fill_(8.0)
    next(step.discriminator.parameters()).register_hook(lambda gradient: gradient * float("inf"))
    real, z = _batch()
    step(real, z, z)
    assert step.loss_scale.item() == 4 and step.equilibrium.k.item() == 0


def test_state_comes_back_bit_for_bit() -> None:
    real, z = _batch()
    first = _step()
    for _ in range(2):
        first(real, z, z)
    second = _step(replace(TRAIN, lr=5e-4))
    second.load_training_state(copy.deepcopy(first.training_state()))
    for step in (first, second):
        step(real, z, z)
    assert all(torch.equal(a, b) for a, b in zip(_weights(first), _weights(second), strict=True))
    assert torch.equal(first.equilibrium.k, second.equilibrium.k)


@pytest.mark.parametrize(("passes", "most"), [("textbook", 525), ("single-pass", 865), ("joint", 775)])
def test_operations_of_a_step_grow_on_purpose_only(passes: str, most: int) -> None:
    model = ModelConfig(size=64, filters=4)
    step = _step(replace(TRAIN, passes=passes), model)
    real, z = torch.rand(4, 3, 64, 64).contiguous(memory_format=torch.channels_last), torch.rand(4, 64)
    step(real, z, z)
    with OperationCount() as count:
        step(real, z, z)
    print(f"{passes}: {count.calls.total()} operations, {dict(count.calls.most_common(8))}")
    assert count.calls.total() <= most
    # two a level, and the image or the stem; tables from the second level on
    decoder, encoder, tables = 9, 9, 2 * (passes != "textbook")
    discriminator = encoder + decoder + tables
    runs = {"textbook": 3, "single-pass": 2, "joint": 1}[passes]
    copies = passes == "joint"  # a table for each half
    assert count.calls["convolution"] == decoder + tables + runs * discriminator + copies * tables


class _LayoutCopies(TorchDispatchMode):
    """Counts copies of four dimensions and more into another order in memory."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        name = func.__name__.partition(".")[0]
        if name in ("clone", "copy_", "_to_copy") and isinstance(made, Tensor) and made.dim() >= 4:
            self.count += args[name == "copy_"].stride() != made.stride()
        return made


@pytest.mark.parametrize(
    ("passes", "updates", "latents", "dtype", "most"),
    [
        ("single-pass", "simultaneous", "shared", None, 18),
        ("single-pass", "simultaneous", "shared", torch.bfloat16, 22),
        ("single-pass", "alternating", "independent", None, 28),
        ("joint", "simultaneous", "shared", None, 17),
        ("joint", "simultaneous", "shared", torch.bfloat16, 21),
        ("joint", "alternating", "independent", None, 27),
    ],
)
def test_copies_between_memory_formats(
    passes: str, updates: str, latents: str, dtype: torch.dtype | None, most: int
) -> None:
    """Weights are folded, h0 and tables change form; maps stay channels_last from end to end."""
    step = _step(replace(TRAIN, passes=passes, updates=updates, latents=latents), replace(MODEL, filters=8), dtype)
    real, z = _batch()
    step(real, z, z)
    with _LayoutCopies() as copies:
        step(real, z, z)
    assert copies.count <= most


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x, z: (x.byte(), z, z),
            r"real is uint8 \[4, 3, 32, 32\]; accepted: floating-point images \[N, 3, 32, 32",
        ),
        (lambda x, z: (127.5 * (x + 1), z, z), "real has values from .* to .*; accepted: -1 to 1"),
        (lambda x, z: (x[:, :1], z, z), r"real is float32 \[4, 1, 32, 32\]; accepted"),
        (lambda x, z: (x[..., :16], z, z), r"real is float32 \[4, 3, 32, 16\]; accepted"),
        (lambda x, z: (x[0], z, z), r"real is float32 \[3, 32, 32\]; accepted"),
        (lambda x, z: (x[:0], z[:0], z[:0]), r"real is float32 \[0, 3, 32, 32\]; accepted"),
        (lambda x, z: (x, z[:3], z), r"z_d is float32 \[3, 8\]; accepted: floating-point latents \[4, 8\]"),
        (lambda x, z: (x, z, z[:, :5]), r"z_g is float32 \[4, 5\]; accepted: floating-point latents \[4, 8\]"),
        (lambda x, z: (x, z.long(), z), r"z_d is int64 \[4, 8\]; accepted"),
        (lambda x, z: (x[:3], z[:3], z[:3]), "real has 3 images; accepted: multiples of accumulate, 2"),
    ],
)
def test_a_batch_that_no_step_takes_is_named(change: Any, message: str) -> None:
    step = _step(replace(TRAIN, accumulate=2))
    real, z = _batch()
    before = step.fingerprint()
    for _ in range(2):  # the second time, too
        with pytest.raises(UserError, match=message):
            step(*change(real, z))
    assert step.fingerprint() == before
    step(real, z, z)
    step(real * torch.nan, z, z)  # for the flag on the device to tell
    assert step.found_bad.item() == 1


def test_a_step_goes_with_its_last_name() -> None:
    """No cycle keeps its memory until the collector comes: `doctor` tries many batches, one after another."""
    step = _step(replace(TRAIN, accumulate=2))
    real, z = _batch()
    step(real, z, z)
    gc.disable()
    try:
        gone = weakref.ref(step)
        del step
        assert gone() is None
    finally:
        gc.enable()


def test_cudnns_search_is_given_up_where_it_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    step, plain = _step(), _step()
    real, z = _batch()
    compute, failures = step.objective.for_both, []

    def short_of_memory(*batch: Tensor) -> tuple[Tensor, Tensor]:
        if torch.backends.cudnn.benchmark:
            failures.append(compute(*batch))  # gradients that must not be counted twice
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB")
        return compute(*batch)

    monkeypatch.setattr(step.objective, "for_both", short_of_memory)
    monkeypatch.setattr(step, "device", torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    with pytest.warns(UserWarning, match="cuDNN's search for algorithms does not fit into memory, going on without it"):
        step(real, z, z)
    assert len(failures) == 1 and not torch.backends.cudnn.benchmark
    plain(real, z, z)
    assert all(torch.equal(a, b) for a, b in zip(_weights(step), _weights(plain), strict=True))
    monkeypatch.setattr(step.objective, "for_both", _no_memory)
    with pytest.raises(torch.OutOfMemoryError):  # there is nothing left to give up
        step(real, z, z)


def _no_memory(*_: Tensor) -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def test_k_is_the_equilibriums_own_after_buffers_were_replaced() -> None:
    filled, loaded = _step(), _step()
    filled.equilibrium.k.fill_(1)
    state = {name: value.clone() for name, value in loaded.state_dict().items()}
    state["equilibrium.k"].fill_(1)
    loaded.load_state_dict(state, assign=True)
    loaded.optimizer_d, loaded.optimizer_g = loaded._adam(loaded.discriminator), loaded._adam(loaded.generator)
    real, z = _batch()
    for step in (filled, loaded):
        step(real, z, z)
    for a, b in zip(filled.discriminator.parameters(), loaded.discriminator.parameters(), strict=True):
        assert torch.equal(a, b)
