"""Weight folding: nearest x2 followed by conv3x3 is one 4x4 transposed convolution of stride 2."""

from __future__ import annotations

import torch
from torch import Tensor

# row t of the 4x4 kernel sums these rows of the 3x3 kernel (output row y reads input row i at t = y - 2i + 1)
_ROWS = ((0.0, 0.0, 1.0), (0.0, 1.0, 1.0), (1.0, 1.0, 0.0), (1.0, 0.0, 0.0))


def fold_upsample(weight: Tensor) -> Tensor:
    """3x3 weights [K, C, 3, 3] of a conv after nearest x2 -> conv_transpose2d weights [C, K, 4, 4].

    Exact and linear, hence differentiable by its transpose. Sums in the weight's own dtype: fold float32 masters,
    then cast.
    """
    rows = torch.tensor(_ROWS, dtype=weight.dtype, device=weight.device)
    return torch.einsum("ta,sb,kcab->ckts", rows, rows, weight)
