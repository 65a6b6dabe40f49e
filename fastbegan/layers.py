"""Drop-in layers and losses for your own nets, from `fastbegan_kernels.layers` and `fastbegan_kernels.losses`.

State dicts of the convolutions are those of `nn.Conv2d`. Images and feature maps are [N, C, H, W] in float32, bf16,
fp16 or float64.
"""

from fastbegan_kernels.layers import (
    Conv2dELU,
    ConvStage,
    DownsampleConv2dELU,
    Equilibrium,
    GroupNormSiLU,
    UpsampleConv2dELU,
)
from fastbegan_kernels.losses import (
    HingeLoss,
    L1ReconstructionLoss,
    L2ReconstructionLoss,
    LatentL1Loss,
    PullAwayTerm,
    SqrtSumReconstructionLoss,
)

__all__ = [
    "Conv2dELU",
    "ConvStage",
    "DownsampleConv2dELU",
    "Equilibrium",
    "GroupNormSiLU",
    "HingeLoss",
    "L1ReconstructionLoss",
    "L2ReconstructionLoss",
    "LatentL1Loss",
    "PullAwayTerm",
    "SqrtSumReconstructionLoss",
    "UpsampleConv2dELU",
]
