"""Losses of auto-encoder GANs as modules: reconstruction errors one a sample, and what the family adds to them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import reference
from .l1_reconstruction_loss import l1_reconstruction_loss


class L1ReconstructionLoss(nn.Module):
    """Mean of |target - prediction| of each sample (BEGAN §3.1): [N, ...], [N, ...] -> [N] float32."""

    eta = 1

    def __init__(self, *, detach_target: bool = False) -> None:
        super().__init__()
        self.detach_target = detach_target

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        return l1_reconstruction_loss(prediction, target, eta=self.eta, detach_target=self.detach_target)


class L2ReconstructionLoss(L1ReconstructionLoss):
    """Mean of (target - prediction)^2 of each sample: [N, ...], [N, ...] -> [N] float32."""

    eta = 2


class SqrtSumReconstructionLoss(nn.Module):
    """Euclidean distance of each sample to its reconstruction (EBGAN's energy, arXiv 1609.03126 §2.3): -> [N] float32.

    Its gradient is 0 where both are equal.
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        reference.check_loss(prediction, target, 2)
        wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
        return torch.linalg.vector_norm((prediction.to(wide) - target.to(wide)).flatten(1), dim=1)


class HingeLoss(nn.Module):
    """relu(margin - energy) (EBGAN §2.1): what D pays for generated samples of too little energy; any shape."""

    def __init__(self, margin: float) -> None:
        super().__init__()
        reference.require_number("margin", margin, "numbers above 0", lambda number: number > 0)
        self.margin = margin

    def forward(self, energy: Tensor) -> Tensor:
        return torch.relu(self.margin - energy)


class LatentL1Loss(nn.Module):
    """Mean of |z - code| of each sample: [N, ...], [N, ...] -> [N] float32. BEGAN-CS (Chang et al. 2018) takes the code
    that D's encoder gives G(z).
    """

    def forward(self, code: Tensor, z: Tensor) -> Tensor:
        return l1_reconstruction_loss(code, z)


class PullAwayTerm(nn.Module):
    """Mean squared cosine between the codes of different samples (EBGAN §2.4): [N, ...] -> [] float32; N from 2."""

    def forward(self, codes: Tensor) -> Tensor:
        if len(codes) < 2:
            raise ValueError(f"codes is {list(codes.shape)}; accepted: [N, ...] of at least two samples")
        wide = torch.promote_types(codes.dtype, torch.float32)
        with torch.autocast(codes.device.type, enabled=False):
            flat = nn.functional.normalize(codes.flatten(1).to(wide), dim=1)
            squares = (flat @ flat.t()).square()
        count = len(codes)
        return (squares.sum() - squares.diagonal().sum()) / (count * (count - 1))
