"""Losses of auto-encoder GANs as modules: reconstruction losses per sample, and terms that EBGAN and BEGAN-CS add."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from . import arguments
from .l1_reconstruction_loss import l1_reconstruction_loss


class L1ReconstructionLoss(nn.Module):
    """Mean absolute error of each sample: mean of `|target - prediction|` (BEGAN §3.1)."""

    eta = 1

    def __init__(self, *, detach_target: bool = False) -> None:
        """Create the loss.

        Args:
            detach_target: Keep gradients from the target.
        """
        super().__init__()
        self.detach_target = detach_target

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the loss of each sample (`l1_reconstruction_loss`).

        Args:
            prediction: Reconstructions [N, ...] in any floating-point dtype.
            target: Targets of the same shape.

        Returns:
            Losses [N] in float32 (float64 for float64 inputs).
        """
        return l1_reconstruction_loss(prediction, target, eta=self.eta, detach_target=self.detach_target)


class L2ReconstructionLoss(L1ReconstructionLoss):
    """Mean squared error of each sample: mean of (target - prediction)^2. Arguments as `L1ReconstructionLoss`."""

    eta = 2


class SqrtSumReconstructionLoss(nn.Module):
    """Euclidean distance of each sample to its reconstruction, EBGAN's energy (arXiv 1609.03126 §2.3).

    Its gradient is 0 where both are equal.
    """

    def forward(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Compute the energy of each sample.

        Args:
            prediction: Reconstructions [N, ...] in any floating-point dtype.
            target: Targets of the same shape.

        Returns:
            Energies [N] in float32 (float64 for float64 inputs).
        """
        arguments.check_loss(prediction, target, 2)
        wide = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
        return torch.linalg.vector_norm((prediction.to(wide) - target.to(wide)).flatten(1), dim=1)


class HingeLoss(nn.Module):
    """relu(margin - energy), EBGAN's loss of D on generated samples (arXiv 1609.03126 §2.1)."""

    def __init__(self, margin: float) -> None:
        """Create the loss.

        Args:
            margin: Energy from which generated samples cost nothing, above 0. Another value raises ValueError.
        """
        super().__init__()
        arguments.require_number("margin", margin, "numbers above 0", lambda number: number > 0)
        self.margin = margin

    def forward(self, energy: Tensor) -> Tensor:
        """Compute the hinge.

        Args:
            energy: Energies of any shape and floating-point dtype.

        Returns:
            relu(margin - energy) in the same shape and dtype.
        """
        return torch.relu(self.margin - energy)


class LatentL1Loss(nn.Module):
    """Mean of `|z - code|` of each sample. In BEGAN-CS (Chang et al. 2018), the code is D's encoding of G(z)."""

    def forward(self, code: Tensor, z: Tensor) -> Tensor:
        """Compute the loss of each sample.

        Args:
            code: Codes [N, ...] in any floating-point dtype.
            z: Latents of the same shape.

        Returns:
            Losses [N] in float32 (float64 for float64 inputs).
        """
        return l1_reconstruction_loss(code, z)


class PullAwayTerm(nn.Module):
    """Mean squared cosine between codes of different samples (EBGAN, arXiv 1609.03126 §2.4)."""

    def forward(self, codes: Tensor) -> Tensor:
        """Compute the term.

        Args:
            codes: Codes [N, ...] of at least two samples, in any floating-point dtype. Fewer raise ValueError.

        Returns:
            A scalar from 0 to 1 in float32 (float64 for float64 inputs).
        """
        if len(codes) < 2:
            raise ValueError(f"codes is {list(codes.shape)}; accepted: [N, ...] of at least two samples")
        wide = torch.promote_types(codes.dtype, torch.float32)
        with torch.autocast(codes.device.type, enabled=False):
            flat = nn.functional.normalize(codes.flatten(1).to(wide), dim=1)
            squares = (flat @ flat.t()).square()
        count = len(codes)
        return (squares.sum() - squares.diagonal().sum()) / (count * (count - 1))
