"""equilibrium_update: BEGAN's k, M and running sums, on the device."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import arguments, problems, reference, tuning
from .dispatch import op_impl


def equilibrium_update(  # noqa: PLR0913
    loss_real: Tensor,
    loss_fake: Tensor,
    k: Tensor,
    sums: Tensor,
    window: Tensor,
    skip: Tensor | None = None,
    *,
    gamma: float,
    lambda_k: float,
    impl: str | None = None,
) -> None:
    """Advance BEGAN's controller by one step, in place (paper §3.4).

    With L(x) and L(G(z)) as the means of `loss_real` and `loss_fake`:

    - `sums += [L(x), L(G(z)), k, M, |L(x) - L(G(z))|, 1]`, with k before the step;
    - window += [M, 1];
    - `k <- clamp(k + lambda_k (gamma L(x) - L(G(z))), 0, 1)`;

    where `M = L(x) + |gamma L(x) - L(G(z))|` measures convergence. NaN in a loss reaches k. All values stay on the
    device, so a step needs no transfer. The fused tier is one kernel. `reference.equilibrium_update` is the plain twin.

    Not differentiable: call it under torch.no_grad(), as `layers.Equilibrium.update` does.

    Args:
        loss_real: Losses of real images, one per sample [N] or a scalar.
        loss_fake: Losses of generated images, as many values as `loss_real`.
        k: Controller state, one value from 0 to 1, float32 (or float64 in plain operations). Changed in place.
        sums: Running sums [6] in k's dtype, contiguous. Changed in place.
        window: Running sums [2] in float64, contiguous. Changed in place.
        skip: One torch.bool on the device, or None. Where it holds True, nothing changes.
        gamma: Diversity ratio E[L(G(z))] / E[L(x)] to hold, 0 to 1.
        lambda_k: Gain of k, from 0; the paper takes 0.001.
        impl: "reference", "algebraic" or "fused" forces a tier. None takes FASTBEGAN_IMPL from the environment, else
            the kernel if it is verified on this machine.

    Raises:
        ValueError: Shapes, dtypes, gamma or lambda_k are not as above.
        RuntimeError: The fused tier is forced where it cannot run: no GPU, no Triton, or tensors that are not float32.
    """
    arguments.check_controller(gamma, lambda_k)
    if loss_real.shape != loss_fake.shape and loss_real.numel() != loss_fake.numel():
        raise ValueError(f"loss_real is {list(loss_real.shape)} but loss_fake {list(loss_fake.shape)}; they must match")
    for name, state, size, dtype in (
        ("k", k, 1, None),
        ("sums", sums, 6, k.dtype),
        ("window", window, 2, torch.float64),
    ):
        if state.numel() != size or not state.is_contiguous() or (dtype is not None and state.dtype != dtype):
            accepted = f"{size} dense values of {dtype or 'a floating-point type'}"
            raise ValueError(f"{name} is {state.dtype} {list(state.shape)}; accepted: {accepted}")
    if skip is not None and (skip.dtype != torch.bool or skip.numel() != 1):
        raise ValueError(f"skip is {skip.dtype} {list(skip.shape)}; accepted: one torch.bool")
    mode = op_impl(impl, (loss_real, loss_fake, k), (torch.float32,))
    if mode is None:
        reference.equilibrium_update(loss_real, loss_fake, k, sums, window, skip, gamma=gamma, lambda_k=lambda_k)
    else:
        _equilibrium_update(loss_real, loss_fake, k, sums, window, skip, gamma, lambda_k, mode)


@torch.library.custom_op("fastbegan::equilibrium_update", mutates_args=("k", "sums", "window"))
def _equilibrium_update(  # noqa: PLR0913
    loss_real: Tensor,
    loss_fake: Tensor,
    k: Tensor,
    sums: Tensor,
    window: Tensor,
    skip: Tensor | None,
    gamma: float,
    lambda_k: float,
    impl: str,
) -> None:
    fused = tuning.is_fused("equilibrium_update", torch.float32, k.device, impl)
    _update(fused)(loss_real, loss_fake, k, sums, window, skip, gamma=gamma, lambda_k=lambda_k)


def _update(fused: bool) -> Callable[..., None]:
    """The kernel's launcher, or the plain twin."""
    if fused:
        from .fused import equilibrium_update as kernel

        return kernel.equilibrium_update
    return reference.equilibrium_update


@problems.checks("equilibrium_update")
def _check(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    results: list[Tensor] = []
    for samples in (1, 16, 300):
        real, fake = (problems.draw(device, dtype, seed, samples).abs() for seed in (0, 1))
        k, sums = torch.full((), 0.25, dtype=dtype, device=device), torch.ones(6, dtype=dtype, device=device)
        window = torch.ones(2, dtype=torch.float64, device=device)
        for skip in (None, torch.tensor(True, device=device), torch.tensor(False, device=device)):
            _update(fused)(real, fake, k, sums, window, skip, gamma=0.5, lambda_k=0.125)
        results += [k, sums, window]
    return results
