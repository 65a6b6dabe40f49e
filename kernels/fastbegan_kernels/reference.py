"""The specification: every public function in plain, differentiable PyTorch, any device and dtype."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

ACTIVATIONS = ("elu", "relu", "leaky_relu", "silu", "none")


def activate(x: Tensor, activation: str = "elu", alpha: float = 1.0) -> Tensor:
    """Apply one of ACTIVATIONS. `alpha` is ELU's scale or leaky_relu's negative slope, both >= 0.

    Raises ValueError for an unknown name or a negative alpha (the derivative could not be told from the output).
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"activation is {activation!r}; accepted: {', '.join(ACTIVATIONS)}")
    if alpha < 0:
        raise ValueError(f"alpha is {alpha}; accepted: numbers >= 0")
    if activation == "elu":
        return F.elu(x, alpha)
    if activation == "relu":
        return F.relu(x)
    if activation == "leaky_relu":
        return F.leaky_relu(x, alpha)
    return F.silu(x) if activation == "silu" else x


def blend(x: Tensor, y: Tensor, carry: Tensor | None) -> Tensor:
    """Vanishing residual (paper §3.5.1): carry * x + (1 - carry) * y; y itself where carry is None."""
    return y if carry is None else carry * x + (1 - carry) * y


def conv2d_elu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    stride: int = 1,
    activation: str = "elu",
    alpha: float = 1.0,
    carry: Tensor | None = None,
) -> Tensor:
    """act(conv2d(x) + bias), "same" padding for odd kernels, blended with x by `carry` where given.

    x [N, C, H, W]; weight [K, C, kh, kw] as nn.Conv2d holds it; bias [K]; result [N, K, ceil(H / stride),
    ceil(W / stride)]. `carry` is a scalar tensor and needs stride 1 and K = C.
    """
    padding = (weight.shape[2] // 2, weight.shape[3] // 2)
    y = activate(F.conv2d(x, weight, bias, stride, padding), activation, alpha)
    return blend(x, y, carry)


def upsample_conv2d_elu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str = "elu",
    alpha: float = 1.0,
    carry: Tensor | None = None,
) -> Tensor:
    """Nearest-neighbour upsampling by 2, then conv2d_elu with a 3x3 kernel.

    x [N, C, H, W] -> [N, K, 2H, 2W]; weight [K, C, 3, 3]. `carry` blends with the upsampled x.
    """
    x = F.interpolate(x, scale_factor=2.0, mode="nearest")
    return conv2d_elu(x, weight, bias, activation=activation, alpha=alpha, carry=carry)


def l1_reconstruction_loss(prediction: Tensor, target: Tensor, *, eta: int = 1, detach_target: bool = False) -> Tensor:
    """Per-sample mean of |target - prediction|^eta over all other dimensions (paper §3.1): [N, ...] -> [N].

    eta is 1 or 2. Accumulated and returned in float32 (float64 for float64 input). The gradient reaches both
    arguments unless `detach_target`.
    """
    if eta not in (1, 2):
        raise ValueError(f"eta is {eta!r}; accepted: 1, 2")
    if prediction.shape != target.shape:
        raise ValueError(f"prediction is {list(prediction.shape)} but target is {list(target.shape)}; they must match")
    wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    difference = prediction.to(wide) - (target.detach() if detach_target else target).to(wide)
    error = difference.abs() if eta == 1 else difference.square()
    return error.flatten(1).mean(1)


def normalize_images(
    images: Tensor,
    index: Tensor | None = None,
    flip: Tensor | None = None,
    *,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 images [M, H, W, C] -> batch [N, C, H, W] in [-1, 1], channels_last.

    `index` [N] int64 picks and orders images (all, in order, where None); `flip` [N] bool mirrors left-right.
    """
    batch = images if index is None else images[index]
    if flip is not None:
        batch = torch.where(flip[:, None, None, None], batch.flip(2), batch)
    return batch.to(dtype).div_(127.5).sub_(1).permute(0, 3, 1, 2)  # [N, C, H, W]
