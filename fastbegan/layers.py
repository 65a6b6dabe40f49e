"""Drop-in layers and losses, of `fastbegan_kernels.layers` and `fastbegan_kernels.losses`."""

from fastbegan_kernels.layers import (
    Conv2dELU,
    ConvStage,
    DownsampleConv2dELU,
    Equilibrium,
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
    "HingeLoss",
    "L1ReconstructionLoss",
    "L2ReconstructionLoss",
    "LatentL1Loss",
    "PullAwayTerm",
    "SqrtSumReconstructionLoss",
    "UpsampleConv2dELU",
]
