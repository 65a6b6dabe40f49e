"""skip_phase_table: the convolution of an upsampled small map, computed on the small map."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from . import library, problems, reference, tuning
from .dispatch import asked_for
from .fold import fold
from .layout import is_channels_last, lay_out
from .library_op import library_op


def skip_phase_table(h: Tensor, weight: Tensor, *, impl: str | None = None) -> Tensor:
    """Compute all values of conv3x3(nearest_xk(h), weight), for every k >= 2 at once, on the small map h.

    An output pixel lies in the first, an inner or the last row and column of its k x k cell. These 3 x 3 phases are all
    the values that a cell has. `upsample_conv2d_elu` takes the table as `skip` and expands it, so BEGAN's skip
    connections (paper §3.5.1) cost no convolution at full size.

    Taps that read the same pixel of h are summed before multiplying: 25 products per pixel of h and channel pair in
    place of 81. The algebraic and the fused tier both use the library's 1x1 convolution.
    `reference.skip_phase_table` is the plain twin.

    Gradients reach h and weight, and can be differentiated again.

    Args:
        h: Small map [N, C, S, S] in any floating-point dtype and memory format. Autocast casts it.
        weight: [K, C, 3, 3], or folded once for many calls (`fold`, kind "skip") [25 K, C, 1, 1]. A folded weight has
            h's dtype outside of autocast.
        impl: "reference", "algebraic" or "fused" forces a tier; it concerns the folding of `weight` only. None takes
            FASTBEGAN_IMPL from the environment, else the fastest form verified on this machine.

    Returns:
        Phase table [N, 3, 3, S, S, K] in h's dtype (autocast's where it is on). Axes 1 and 2 are the phases of row and
        column: first, inner, last.

    Raises:
        ValueError: `weight` cannot be folded, or `impl` is not among those above.
        RuntimeError: The fused tier is forced where it cannot run, or torch's convolution refuses the shapes.
    """
    if asked_for(impl) == "reference" and weight.shape[2] == 3:
        return reference.skip_phase_table(h, weight)
    if weight.shape[2] == 3:
        h = lay_out(h, True) if is_channels_last(weight) else h
        (weight,) = fold([weight], ["skip"], dtype=h.dtype, impl=impl)
        # the strides of a packed 1x1 weight read as channels_last, and would decide the format of h's gradient
        weight = lay_out(weight, False)
    sums = F.conv2d(h, weight).permute(0, 2, 3, 1).unflatten(3, (5, 5, -1))  # [N, S, S, 5, 5, K]
    return _join(_join(sums, 1, 3), 2, 4).permute(0, 3, 4, 1, 2, 5)


def _join(sums: Tensor, space: int, dim: int) -> Tensor:
    """The three phases from the five sums of taps along `dim`, each moved along `space` to the pixel it belongs to."""
    before, first, inner, last, behind = sums.unbind(dim)
    size = sums.shape[space]
    edge = torch.zeros_like(inner.narrow(space, 0, 1))
    before = torch.cat((edge, before.narrow(space, 0, size - 1)), space)
    behind = torch.cat((behind.narrow(space, 1, size - 1), edge), space)
    return torch.stack((before + first, inner, last + behind), dim)


def _gradient_like(dz: Tensor, size: int, impl: str) -> Tensor:
    return dz.new_empty(dz.shape[0], size, size, 3, 3, dz.shape[1]).permute(0, 3, 4, 1, 2, 5)


@library_op(_gradient_like)
def skip_gradient(dz: Tensor, size: int, impl: str) -> Tensor:
    """Sum the gradient at an up-convolution's output over the pixels of each entry of a phase table.

    Args:
        dz: [N, K, H, W] before the activation.
        size: S, the side of the small map; it divides H and W.
        impl: From `op_impl`.

    Returns:
        [N, 3, 3, S, S, K] in dz's dtype, in memory [N, S, S, 3, 3, K].
    """
    fused = dz.numel() > 0 and tuning.is_fused("skip_gradient", dz.dtype, dz.device, impl)
    return _skip_gradient(dz, size, fused=fused)


def _skip_gradient(dz: Tensor, size: int, *, fused: bool) -> Tensor:
    """In memory [N, S, S, 3, 3, K]."""
    if fused:
        from .fused import skip_phase_table as kernel

        return kernel.skip_gradient(dz, size)
    return library.skip_gradient(dz, size).permute(0, 3, 4, 1, 2, 5).contiguous().permute(0, 3, 4, 1, 2, 5)


@problems.checks("skip_gradient")
def _check(device: torch.device, dtype: torch.dtype, fused: bool) -> list[Tensor]:
    small, large = problems.draw(device, dtype, 0, 2, 37, 12, 18), problems.draw(device, dtype, 1, 2, 32, 32, 32)
    return [_skip_gradient(dz, size, fused=fused) for dz, size in ((small, 2), (small, 6), (large, 8))]
