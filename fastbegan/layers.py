"""Drop-in layers over fastbegan_kernels; their state dict is that of nn.Conv2d."""

from __future__ import annotations

from torch import Tensor, nn

from fastbegan_kernels import conv2d_elu, upsample_conv2d_elu


class Conv2dELU(nn.Conv2d):
    """3x3 convolution, bias and activation: [N, C, H, W] -> [N, K, H / stride, W / stride], channels_last.

    `forward(x, carry)` blends the result with x (paper §3.5.1) where the layer is `residual`: stride 1, K = C. `kind`
    is what `conv_stage` calls it.
    """

    kind = "same"

    def __init__(self, in_channels: int, out_channels: int, stride: int = 1, activation: str = "elu") -> None:
        super().__init__(in_channels, out_channels, 3, stride, padding=1)
        self.activation = activation
        self.residual = stride == 1 and in_channels == out_channels
        if stride == 2:
            self.kind = "down"

    def forward(self, input: Tensor, carry: Tensor | None = None) -> Tensor:
        return conv2d_elu(
            input,
            self.weight,
            self.bias,
            stride=self.stride[0],
            activation=self.activation,
            carry=carry if self.residual else None,
        )


class UpsampleConv2dELU(Conv2dELU):
    """Nearest upsampling by 2, 3x3 convolution, bias and activation: [N, C, H, W] -> [N, K, 2H, 2W]."""

    kind = "up"

    def forward(self, input: Tensor, carry: Tensor | None = None) -> Tensor:
        return upsample_conv2d_elu(
            input,
            self.weight,
            self.bias,
            activation=self.activation,
            carry=carry if self.residual else None,
        )
