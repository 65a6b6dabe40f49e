"""The layers as modules: nn.Conv2d with the operations before and after it, and the equilibrium of BEGAN.

State dicts of convolutions equal those of nn.Conv2d, so checkpoints go both ways. All layers take [N, C, H, W] in
float32, bfloat16, float16 or float64, and follow autocast. As with nn.Conv2d, outputs and input gradients are
channels_last if and only if input or weight is. `model.to(memory_format=torch.channels_last)` saves the copies at the
borders of layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from . import arguments, reference
from .conv2d_elu import conv2d_elu
from .conv_stage import conv_stage
from .equilibrium_update import equilibrium_update
from .group_norm_silu import group_norm_silu
from .upsample_conv2d_elu import upsample_conv2d_elu


class Conv2dELU(nn.Conv2d):
    """Convolution, bias and activation, the module of `conv2d_elu`."""

    def __init__(  # noqa: PLR0913
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 3,
        stride: int = 1,
        *,
        padding: str = "same",
        bias: bool = True,
        activation: str = "elu",
        alpha: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Create the layer with nn.Conv2d's initial weights. Raises ValueError for other values than those below.

        Args:
            in_channels: C.
            out_channels: K.
            kernel_size: An odd number.
            stride: 1 or 2.
            padding: "same" pads zeros on all sides. "end" needs stride 2 and a 3x3 kernel, and pads one row below and
                one column to the right.
            bias: Whether there is a bias.
            activation: "elu", "relu", "leaky_relu", "silu" or "none".
            alpha: Scale of ELU or negative slope of leaky_relu, from 0.
            device: Device of weight and bias.
            dtype: Dtype of weight and bias.
        """
        kind = arguments.conv_kind(stride, padding)
        arguments.check_activation(activation, alpha)
        if kernel_size % 2 == 0 or (padding == "end" and kernel_size != 3):
            raise ValueError(f"kernel_size is {kernel_size}; accepted: odd numbers, with padding 'end' 3")
        zeros = kernel_size // 2 if padding == "same" else 0
        super().__init__(in_channels, out_channels, kernel_size, stride, zeros, bias=bias, device=device, dtype=dtype)
        self.kind, self.activation, self.alpha = kind, activation, alpha
        self.residual = stride == 1 and in_channels == out_channels

    def forward(self, input: Tensor, carry: Tensor | None = None) -> Tensor:
        """Compute the layer's output.

        Args:
            input: [N, C, H, W].
            carry: Share of the input in the output, one number (paper §3.5.1): carry * input + (1 - carry) * output. It
                counts where stride is 1 and K = C (`residual`), and is ignored elsewhere.

        Returns:
            [N, K, ceil(H / stride), ceil(W / stride)], with padding "end" [N, K, H // 2, W // 2].
        """
        if torch.jit.is_tracing():
            return self._traced(input, carry)
        return conv2d_elu(
            input,
            self.weight,
            self.bias,
            stride=self.stride[0],
            padding="end" if self.kind == "down_end" else "same",
            activation=self.activation,
            alpha=self.alpha,
            carry=carry if self.residual else None,
        )

    def _traced(self, x: Tensor, carry: Tensor | None) -> Tensor:
        """The output from torch's own operations, which a trace can save."""
        act, alpha, padding = self.activation, self.alpha, self.kernel_size[0] // 2
        y = reference.plain_layer(
            x, self.weight, self.bias, kind=self.kind, padding=padding, activation=act, alpha=alpha
        )
        x = nn.functional.interpolate(x, scale_factor=2.0) if self.kind == "up" else x
        return reference.blend(x, y, carry if self.residual else None)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class UpsampleConv2dELU(Conv2dELU):
    """Nearest upsampling by 2, 3x3 convolution, bias and activation, the module of `upsample_conv2d_elu`."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        *,
        bias: bool = True,
        activation: str = "elu",
        alpha: float = 1.0,
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Create the layer with nn.Conv2d's initial weights.

        Args:
            in_channels: C.
            out_channels: K.
            bias: Whether there is a bias.
            activation: "elu", "relu", "leaky_relu", "silu" or "none".
            alpha: Scale of ELU or negative slope of leaky_relu, from 0.
            device: Device of weight and bias.
            dtype: Dtype of weight and bias.
        """
        super().__init__(
            in_channels, out_channels, bias=bias, activation=activation, alpha=alpha, device=device, dtype=dtype
        )
        self.kind = "up"

    def forward(self, input: Tensor, carry: Tensor | None = None) -> Tensor:
        """Compute the layer's output.

        Args:
            input: [N, C, H, W].
            carry: Share of the upsampled input in the output, one number (paper §3.5.1). It counts where K = C.

        Returns:
            [N, K, 2H, 2W].
        """
        if torch.jit.is_tracing():
            return self._traced(input, carry)
        carry = carry if self.residual else None
        return upsample_conv2d_elu(
            input, self.weight, self.bias, activation=self.activation, alpha=self.alpha, carry=carry
        )


class DownsampleConv2dELU(Conv2dELU):
    """3x3 convolution of stride 2, bias and activation: [N, C, H, W] -> [N, K, ceil(H / 2), ceil(W / 2)].

    With `padding` "end", as in the encoders of latent diffusion, the output is [N, K, H // 2, W // 2].
    """

    def __init__(self, in_channels: int, out_channels: int, *, padding: str = "same", **options: Any) -> None:
        """Create the layer with nn.Conv2d's initial weights.

        Args:
            in_channels: C.
            out_channels: K.
            padding: "same" or "end", as in Conv2dELU.
            **options: The other keyword arguments of Conv2dELU.
        """
        super().__init__(in_channels, out_channels, stride=2, padding=padding, **options)


class ConvStage(nn.Sequential):
    """Layers one after another as one operation with one backward, the module of `conv_stage`.

    Keys of the state dict are those of nn.Sequential. Activations may differ.
    """

    def __init__(self, *layers: Conv2dELU) -> None:
        """Join layers.

        Args:
            *layers: One or more layers of the kinds above. They share alpha (where elu or leaky_relu use it), and all
                have a bias or none has. ValueError is raised for others.
        """
        for number, layer in enumerate(layers):
            if not isinstance(layer, Conv2dELU):
                raise ValueError(f"layer {number} is a {type(layer).__name__}; accepted: Conv2dELU and its kinds")
        alphas = {layer.alpha for layer in layers if layer.activation in arguments.WITH_ALPHA}
        if not layers or len(alphas) > 1 or len({layer.bias is None for layer in layers}) > 1:
            stage = f"{len(layers)} layers with alpha {sorted(alphas)}, biases {[x.bias is not None for x in layers]}"
            raise ValueError(f"a stage of {stage}; accepted: one or more, of one alpha, all with a bias or none")
        super().__init__(*layers)
        self.alpha = max(alphas, default=1.0)

    def forward(self, input: Tensor) -> Tensor:
        """Compute the last layer's output.

        Args:
            input: [N, C, H, W].

        Returns:
            [N, K, H', W'] as the layers give one after another.
        """
        if torch.jit.is_tracing():
            return super().forward(input)
        layers = [layer for layer in self if isinstance(layer, Conv2dELU)]
        weights = [layer.weight for layer in layers]
        biases = [layer.bias for layer in layers if layer.bias is not None] or None
        activations = [layer.activation for layer in layers]
        kinds = [layer.kind for layer in layers]
        return conv_stage(input, weights, biases, kinds=kinds, activation=activations, alpha=self.alpha)


# DCGAN's initialisation looks for "Conv" in class names, and then expects a weight
ConvStage.__name__ = "Stage"


class GroupNormSiLU(nn.GroupNorm):
    """Group normalisation and SiLU, the module of `group_norm_silu`; its state dict is that of nn.GroupNorm."""

    def __init__(
        self,
        num_groups: int,
        num_channels: int,
        eps: float = 1e-5,
        affine: bool = True,
        *,
        activation: str = "silu",
        device: Any = None,
        dtype: Any = None,
    ) -> None:
        """Create the layer with nn.GroupNorm's initial weights.

        Args:
            num_groups: A divisor of `num_channels`.
            num_channels: C.
            eps: Added to the variance, above 0.
            affine: Whether there are a weight and a bias per channel.
            activation: "silu" or "none". Raises ValueError for others.
            device: Device of the parameters.
            dtype: Dtype of the parameters.
        """
        super().__init__(num_groups, num_channels, eps, affine, device=device, dtype=dtype)
        arguments.check_group_norm(torch.empty(1, num_channels, 1, 1), num_groups, None, None, eps, activation)
        self.activation = activation

    def forward(self, input: Tensor) -> Tensor:
        """Normalise, scale, shift and activate.

        Args:
            input: [N, C, H, W].

        Returns:
            [N, C, H, W] in the input's dtype (float32 under autocast), channels_last if the input is.
        """
        return group_norm_silu(input, self.num_groups, self.weight, self.bias, eps=self.eps, activation=self.activation)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, activation={self.activation}"


class Equilibrium(nn.Module):
    """BEGAN's controller k and its logged sums (paper §3.4), on the device. No step waits for the host.

    Buffers:

    - `k` [] in float32;
    - `sums` [6] in float32, the sums since the last `take` of L(x), L(G(z)), k, M, gap and 1;
    - `window` [2] in float64, the sums since the last `read_window` of M and 1.

    k moves by about 1e-5 per step, which bfloat16 and float16 cannot represent. Keep this module out of `.half()` and
    `.bfloat16()`.
    """

    NAMES = ("loss_real", "loss_fake", "k", "convergence", "gap")

    k: Tensor
    sums: Tensor
    window: Tensor

    def __init__(self, gamma: float = 0.5, lambda_k: float = 1e-3) -> None:
        """Start with k = 0 and empty sums. Raises ValueError for values outside of the ranges below.

        Args:
            gamma: Diversity ratio E[L(G(z))] / E[L(x)], 0 to 1.
            lambda_k: Gain of k, from 0.
        """
        arguments.check_controller(gamma, lambda_k)
        super().__init__()
        self.gamma, self.lambda_k = gamma, lambda_k
        self.register_buffer("k", torch.zeros(()))
        self.register_buffer("sums", torch.zeros(len(self.NAMES) + 1))
        self.register_buffer("window", torch.zeros(2, dtype=torch.float64))

    @torch.no_grad()
    def update(self, loss_real: Tensor, loss_fake: Tensor, skip: Tensor | None = None) -> None:
        """Advance by one step (`equilibrium_update`).

        Args:
            loss_real: Losses of real images, one per sample [N] or a scalar.
            loss_fake: Losses of generated images, as many values.
            skip: One torch.bool on the device. Where it holds True, nothing changes.
        """
        equilibrium_update(
            loss_real, loss_fake, self.k, self.sums, self.window, skip, gamma=self.gamma, lambda_k=self.lambda_k
        )

    def read(self) -> dict[str, float]:
        """Return the means since the last call, then start over. Waits for the device.

        Returns:
            Means by `NAMES`, with the present k.
        """
        return self.means(self.take().tolist())

    def take(self) -> Tensor:
        """Return the sums on the device, then start over.

        Returns:
            `sums` and k in one tensor [7], for `means`.
        """
        taken = torch.cat((self.sums, self.k[None]))
        self.sums.zero_()
        return taken

    def means(self, taken: Sequence[float]) -> dict[str, float]:
        """Compute means from sums.

        Args:
            taken: The seven values of `take`.

        Returns:
            Means by `NAMES`, with the k of that time.
        """
        *sums, count, k = taken
        means = {name: total / max(count, 1.0) for name, total in zip(self.NAMES, sums, strict=True)}
        return means | {"k": k}

    def read_window(self) -> float:
        """Return the mean of M since the last call, then start over. Waits for the device.

        Returns:
            Mean of M, 0 without a step.
        """
        total, count = self.window.tolist()
        self.window.zero_()
        return total / max(count, 1.0)
