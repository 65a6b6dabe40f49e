"""The kernels without a matrix product against their twins in float64."""

from __future__ import annotations

import pytest
import torch

from fastbegan_kernels import (
    equilibrium_update,
    l1_reconstruction_loss,
    l1_reconstruction_loss_with_gradients,
    library,
    normalize_images,
    reference,
)
from tests.helpers.oracle import DEVICE, EXACT, check, compare, outputs_and_gradients, random_tensor

pytestmark = pytest.mark.core
pytest.importorskip("triton")
from fastbegan_kernels.fused import activation as kernels  # noqa: E402
from fastbegan_kernels.fused.skip_phase_table import skip_gradient  # noqa: E402


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("eta", [1, 2])
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 3, 7, 5), (2, 3, 40, 40), (4, 10)])
def test_l1_reconstruction_loss(shape: tuple[int, ...], eta: int, dtype: torch.dtype) -> None:
    inputs = [random_tensor(*shape, seed=1, dtype=dtype), random_tensor(*shape, seed=2, dtype=dtype)]
    if len(shape) == 4:
        inputs[0] = inputs[0].contiguous(memory_format=torch.channels_last)
    fused = lambda p, t: l1_reconstruction_loss(p, t, eta=eta, impl="fused")  # noqa: E731
    check(fused, lambda p, t: reference.l1_reconstruction_loss(p, t, eta=eta), inputs)
    first, second = outputs_and_gradients(fused, inputs), outputs_and_gradients(fused, inputs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))  # sums in a fixed order
    if eta == 1:
        same = inputs[0].detach().clone().requires_grad_()
        assert torch.autograd.grad(fused(same, inputs[0]).sum(), same)[0].count_nonzero() == 0


def test_l1_reconstruction_loss_with_a_detached_target() -> None:
    prediction, target = (random_tensor(2, 3, 4, 4, seed=s).requires_grad_() for s in (1, 2))
    l1_reconstruction_loss(prediction, target, detach_target=True, impl="fused").sum().backward()
    assert target.grad is None and prediction.grad is not None and prediction.grad.isfinite().all()


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("eta", [1, 2])
@pytest.mark.parametrize("scale", [-0.3, [0.5, 0.0, -2.0]])
def test_loss_and_gradients_in_one_pass(scale: float | list[float], eta: int, dtype: torch.dtype) -> None:
    """The same as autograd gives for the sum of the scaled losses, in both forms."""
    prediction, target = (random_tensor(3, 3, 7, 6, seed=s, dtype=dtype) for s in (1, 2))
    factors = torch.tensor(scale, device=DEVICE)

    def by_autograd(dtype: torch.dtype) -> list[torch.Tensor]:
        leaves = [value.to(dtype).requires_grad_() for value in (prediction, target)]
        loss = reference.l1_reconstruction_loss(*leaves, eta=eta)
        return [loss.detach(), *torch.autograd.grad((factors.to(loss.dtype) * loss).sum(), leaves)]

    own, exact = by_autograd(dtype), by_autograd(torch.float64)
    for impl in ("fused", "algebraic"):
        loss, *gradients = l1_reconstruction_loss_with_gradients(
            prediction, target, factors, eta=eta, to_target=True, impl=impl
        )
        assert [g is not None and g.dtype for g in gradients] == [dtype, dtype] and loss.dtype == torch.float32
        compare([loss, *(g for g in gradients if g is not None)], own, exact, dtype)
        assert l1_reconstruction_loss_with_gradients(prediction, target, factors, eta=eta, impl=impl)[2] is None


def test_a_wrong_scale_is_named() -> None:
    image = torch.zeros(3, 2, device=DEVICE)
    with pytest.raises(ValueError, match=r"scale is \[2\]; accepted: one number or \[3\]"):
        l1_reconstruction_loss_with_gradients(image, image, torch.ones(2, device=DEVICE))


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("size", [(8, 8), (5, 7)])
def test_normalize_images(size: tuple[int, int], dtype: torch.dtype) -> None:
    images = torch.randint(0, 256, (6, *size, 3), dtype=torch.uint8, device=DEVICE)
    index = torch.tensor([5, 0, 0, 3], device=DEVICE)
    flip = torch.tensor([True, False, True, False], device=DEVICE)
    corner = torch.tensor([[0, 3], [3, 0], [1, 2], [3, 3]], device=DEVICE)
    for source, order, mirror, window, margin in (
        (images, None, None, None, 0),
        (images, index, None, None, 0),
        (images, index, flip, None, 0),
        (images[:4], None, flip, None, 0),
        (images, index, flip, corner, 3),
        (images[:4], None, None, corner, 3),
        (images, index, flip, None, 2),
    ):
        options = {"corner": window, "margin": margin}
        got = normalize_images(source, order, mirror, dtype=dtype, impl="fused", **options)
        exact = reference.normalize_images(source, order, mirror, dtype=torch.float64, **options)
        assert got.shape == (len(source if order is None else order), 3, size[0] - margin, size[1] - margin)
        assert got.dtype == dtype and got.is_contiguous(memory_format=torch.channels_last)
        assert (got - exact).abs().max() <= {torch.float32: 2e-7, torch.float16: 5e-4, torch.bfloat16: 4e-3}[dtype]


@pytest.mark.parametrize("samples", [1, 16, 300])
@pytest.mark.parametrize("skip", [None, False, True])
def test_equilibrium_update(samples: int, skip: bool | None) -> None:
    flag = None if skip is None else torch.tensor(skip, device=DEVICE)
    states = []
    for impl in ("reference", "fused"):
        k, sums = torch.tensor(0.2, device=DEVICE), torch.ones(6, device=DEVICE)
        window = torch.ones(2, dtype=torch.float64, device=DEVICE)
        for seed in range(3):
            real, fake = (random_tensor(samples, seed=s).abs() for s in (seed, seed + 10))
            equilibrium_update(real, fake, k, sums, window, flag, gamma=0.5, lambda_k=0.01, impl=impl)
        states.append((k, sums, window))
    for got, expected in zip(states[1], states[0], strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-7)
    assert (states[1][0].item() == pytest.approx(0.2)) == bool(skip)


def test_equilibrium_update_takes_scalars_and_refuses_unlike_shapes() -> None:
    k, sums = torch.zeros((), device=DEVICE), torch.zeros(6, device=DEVICE)
    window = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    real, fake = torch.tensor(0.4, device=DEVICE), torch.tensor(0.1, device=DEVICE)
    equilibrium_update(real, fake, k, sums, window, gamma=0.5, lambda_k=0.001, impl="fused")
    assert k.item() == pytest.approx(0.0001, rel=1e-5)
    with pytest.raises(ValueError, match=r"loss_real is \[\] but loss_fake \[3\]"):
        equilibrium_update(real, fake.expand(3), k, sums, window, gamma=0.5, lambda_k=0.001, impl="fused")


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_loss_that_is_nan_shows_in_k(impl: str) -> None:
    k, sums = torch.tensor(0.5, device=DEVICE), torch.zeros(6, device=DEVICE)
    window = torch.zeros(2, dtype=torch.float64, device=DEVICE)
    losses = torch.tensor([float("nan"), 1.0], device=DEVICE)
    equilibrium_update(losses, losses, k, sums, window, gamma=0.5, lambda_k=0.1, impl=impl)
    assert k.isnan()


@pytest.mark.parametrize("impl", ["fused", "reference"])
def test_a_controllers_wrong_state_is_named(impl: str) -> None:
    losses = torch.ones(2, device=DEVICE)
    right = {"k": torch.zeros(()), "sums": torch.zeros(6), "window": torch.zeros(2, dtype=torch.float64), "skip": None}
    wrong = {
        "k": torch.zeros(2),
        "sums": torch.zeros(6, 2)[:, 0],
        "window": torch.zeros(2),
        "skip": torch.ones(1),
    }
    for name, value in wrong.items():
        state = {**right, name: value}
        with pytest.raises(ValueError, match=rf"{name} is torch.float32 \[.*accepted: "):
            equilibrium_update(losses, losses, **state, gamma=0.5, lambda_k=0.1, impl=impl)


def test_k_is_clamped() -> None:
    k, sums, window = torch.tensor(0.999, device=DEVICE), torch.zeros(6, device=DEVICE), torch.zeros(2, device=DEVICE)
    losses = torch.tensor([1.0], device=DEVICE), torch.tensor([0.0], device=DEVICE)
    equilibrium_update(*losses, k, sums, window.double(), gamma=1.0, lambda_k=1.0, impl="fused")
    assert k.item() == 1


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(("activation", "alpha"), [("elu", 1.0), ("leaky_relu", 0.2), ("relu", 1.0), ("none", 1.0)])
@pytest.mark.parametrize("skip", [0, 2])
def test_the_algebraic_epilogue(skip: int, activation: str, alpha: float, dtype: torch.dtype) -> None:
    """Bias, skip table and activation that overwrite a convolution's output, and the activation's backward."""
    z = random_tensor(2, 37, 8, 12, seed=1, dtype=dtype).contiguous(memory_format=torch.channels_last)
    bias = random_tensor(37, seed=2)
    table = random_tensor(2, 3, 3, skip, skip, 37, seed=3, dtype=dtype) if skip else None

    def plain(dtype: torch.dtype) -> torch.Tensor:
        y = z.to(dtype) + bias.to(dtype)[:, None, None]
        y = y if table is None else y + reference.expand_phase_table(table.to(dtype), 8, 12)
        return reference.activate(y, activation, alpha)

    got = kernels.activation(z.clone(), bias, table, activation=activation, alpha=alpha)
    compare([got], [plain(dtype)], [plain(torch.float64)], dtype)
    grad, y = random_tensor(2, 37, 8, 12, seed=4, dtype=dtype), plain(dtype)
    own, exact = (library.activation_backward(grad.to(t), y.to(t), activation, alpha) for t in (dtype, torch.float64))
    back = kernels.activation_backward(grad, y, activation=activation, alpha=alpha)
    compare(list(back), list(own), list(exact), dtype)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize(
    ("size", "height", "width"), [(1, 2, 2), (2, 4, 12), pytest.param(4, 32, 8, marks=pytest.mark.slow)]
)
def test_skip_gradient(size: int, height: int, width: int, dtype: torch.dtype) -> None:
    """The transpose of expanding a phase table."""
    dz = random_tensor(2, 70, height, width, seed=1, dtype=dtype)
    table = torch.zeros(2, 3, 3, size, size, 70, dtype=torch.float64, device=DEVICE, requires_grad=True)
    (exact,) = torch.autograd.grad(reference.expand_phase_table(table, height, width), table, dz.double())
    own = library.skip_gradient(dz, size)
    compare([skip_gradient(dz, size)], [own], [exact], dtype)
    torch.testing.assert_close(library.skip_gradient(dz.double(), size), exact)
