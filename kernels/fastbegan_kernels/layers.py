"""The layers as modules: nn.Conv2d with what comes before and after it, and the equilibrium of BEGAN.

State dicts of convolutions are those of nn.Conv2d, so checkpoints go both ways. All take [N, C, H, W], float32, bf16,
fp16 or float64, and follow autocast. As with nn.Conv2d, outputs and input gradients are channels_last if and only if
input or weight is: `model.to(memory_format=torch.channels_last)` spares layers the copies at their borders.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import reference
from .conv2d_elu import conv2d_elu
from .conv_stage import conv_stage
from .equilibrium_update import equilibrium_update
from .upsample_conv2d_elu import upsample_conv2d_elu


class Conv2dELU(nn.Conv2d):
    """Convolution, bias and activation: [N, C, H, W] -> [N, K, ceil(H / stride), ceil(W / stride)].

    `padding` "same" is zeros on all sides; "end", with stride 2 and 3x3, a row below and a column to the right.
    `forward(x, carry)` blends the result with x (paper §3.5.1) where the layer is `residual`: stride 1, K = C. Raises
    ValueError for what `conv2d_elu` does not compute.
    """

    def __init__(  # noqa: PLR0913
        self, in_channels: int, out_channels: int, kernel_size: int = 3, stride: int = 1, *, padding: str = "same",
        bias: bool = True, activation: str = "elu", alpha: float = 1.0, device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        kind = reference.conv_kind(stride, padding)
        reference.check_activation(activation, alpha)
        if kernel_size % 2 == 0 or (padding == "end" and kernel_size != 3):
            raise ValueError(f"kernel_size is {kernel_size}; accepted: odd numbers, with padding 'end' 3")
        around = kernel_size // 2 if padding == "same" else 0
        super().__init__(
            in_channels, out_channels, kernel_size, stride, around, bias=bias, device=device, dtype=dtype
        )  # fmt: skip
        self.kind, self.activation, self.alpha = kind, activation, alpha
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, input: Tensor, carry: Tensor | None = None) -> Tensor:
        if torch.jit.is_tracing():
            return self._traced(input, carry)
        return conv2d_elu(
            input, self.weight, self.bias, stride=self.stride[0], padding="end" if self.kind == "down_end" else "same",
            activation=self.activation, alpha=self.alpha, carry=carry if self.residual else None,
        )  # fmt: skip

    def _traced(self, x: Tensor, carry: Tensor | None) -> Tensor:
        """In operations of torch, which can be saved."""
        y = reference.plain_layer(
            x, self.weight, self.bias, kind=self.kind, padding=self.kernel_size[0] // 2, activation=self.activation,
            alpha=self.alpha,
        )  # fmt: skip
        x = nn.functional.interpolate(x, scale_factor=2.0) if self.kind == "up" else x
        return reference.blend(x, y, carry if self.residual else None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class UpsampleConv2dELU(Conv2dELU):
    """Nearest upsampling by 2, 3x3 convolution, bias and activation: [N, C, H, W] -> [N, K, 2H, 2W]."""

    def __init__(
        self, in_channels: int, out_channels: int, *, bias: bool = True, activation: str = "elu", alpha: float = 1.0,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(
            in_channels, out_channels, bias=bias, activation=activation, alpha=alpha, device=device, dtype=dtype
        )
        self.kind = "up"

    def forward(self, input: Tensor, carry: Tensor | None = None) -> Tensor:
        if torch.jit.is_tracing():
            return self._traced(input, carry)
        return upsample_conv2d_elu(
            input, self.weight, self.bias, activation=self.activation, alpha=self.alpha,
            carry=carry if self.residual else None,
        )  # fmt: skip


class DownsampleConv2dELU(Conv2dELU):
    """3x3 convolution of stride 2, bias and activation: [N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)].

    With `padding` "end" [N, K, H // 2, W // 2], as latent diffusion's encoders halve.
    """

    def __init__(self, in_channels: int, out_channels: int, *, padding: str = "same", **options: Any) -> None:
        """`options` are those of Conv2dELU."""
        super().__init__(in_channels, out_channels, stride=2, padding=padding, **options)


class ConvStage(nn.Sequential):
    """Layers of the kinds above, one after another, as one operation with one backward; keys as in nn.Sequential.

    Activations may differ. Raises ValueError for other modules, and for layers that differ in alpha (where elu or
    leaky_relu takes it) or in having a bias.
    """

    def __init__(self, *layers: Conv2dELU) -> None:
        for number, layer in enumerate(layers):
            if not isinstance(layer, Conv2dELU):
                raise ValueError(f"layer {number} is a {type(layer).__name__}; accepted: Conv2dELU and its kinds")
        alphas = {layer.alpha for layer in layers if layer.activation in ("elu", "leaky_relu")}
        if not layers or len(alphas) > 1 or len({layer.bias is None for layer in layers}) > 1:
            found = f"{len(layers)} layers with alpha {sorted(alphas)}, biases {[x.bias is not None for x in layers]}"
            raise ValueError(f"a stage of {found}; accepted: one or more, of one alpha, all with a bias or none")
        super().__init__(*layers)
        self.alpha = max(alphas, default=1.0)

    def forward(self, input: Tensor) -> Tensor:
        if torch.jit.is_tracing():
            return super().forward(input)
        layers = [layer for layer in self if isinstance(layer, Conv2dELU)]
        biases = [layer.bias for layer in layers if layer.bias is not None]
        return conv_stage(
            input, [layer.weight for layer in layers], biases or None, kinds=[layer.kind for layer in layers],
            activation=[layer.activation for layer in layers], alpha=self.alpha,
        )  # fmt: skip


# functions that initialise by class name (DCGAN's) look for "Conv" in it, and then for a weight
ConvStage.__name__ = "Stage"


class Equilibrium(nn.Module):
    """k and what is logged about it, float32 on the device; nothing here is read by the host inside a step.

    Buffers: `k` []; `sums` [6], the sums since the last `take` of L(x), L(G(z)), k, M, gap and of ones;
    `window` [2], the sum of M since the last `read_window` and the count. k moves by about 1e-5 a step, which bf16
    and fp16 cannot hold: keep this module out of `.half()` and `.bfloat16()`.
    """

    NAMES = ("loss_real", "loss_fake", "k", "convergence", "gap")

    k: Tensor
    sums: Tensor
    window: Tensor

    def __init__(self, gamma: float = 0.5, lambda_k: float = 1e-3) -> None:
        reference.check_controller(gamma, lambda_k)
        super().__init__()
        self.gamma, self.lambda_k = gamma, lambda_k
        self.register_buffer("k", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(len(self.NAMES) + 1))
        self.register_buffer("window", torch.zeros(2, dtype=torch.float64))

    @torch.no_grad()
    def update(self, loss_real: Tensor, loss_fake: Tensor, skip: Tensor | None = None) -> None:
        """Advance by one step from losses, scalar or one a sample; where the bool `skip` holds, change nothing."""
        equilibrium_update(
            loss_real, loss_fake, self.k, self.sums, self.window, skip, gamma=self.gamma, lambda_k=self.lambda_k
        )

    def read(self) -> dict[str, float]:
        """Means since the last call (k itself as it is now), then start over. Waits for the device."""
        return self.means(self.take().tolist())

    def take(self) -> Tensor:
        """`sums` and k [7] on the device, for `means`; then start over."""
        taken = torch.cat((self.sums, self.k[None]))
        self.sums.zero_()
        return taken

    def means(self, taken: Sequence[float]) -> dict[str, float]:
        """Means by `NAMES` of what `take` gave, with k as it was then."""
        *sums, count, k = taken
        found = {name: total / max(count, 1.0) for name, total in zip(self.NAMES, sums, strict=True)}
        return found | {"k": k}

    def read_window(self) -> float:
        """Mean of M since the last call, then start over. Waits for the device."""
        total, count = self.window.tolist()
        self.window.zero_()
        return total / max(count, 1.0)
