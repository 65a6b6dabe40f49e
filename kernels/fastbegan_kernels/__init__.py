"""Layers and losses of auto-encoder GANs as plain functions over tensors.

Every function has a plain PyTorch twin of the same name in `fastbegan_kernels.reference`, which is its
specification; `impl=` (or the environment variable FASTBEGAN_IMPL) chooses between the tiers.
"""

from . import reference
from .conv2d_elu import conv2d_elu
from .equilibrium_update import equilibrium_update
from .l1_reconstruction_loss import l1_reconstruction_loss
from .normalize_images import normalize_images
from .upsample_conv2d_elu import upsample_conv2d_elu

__all__ = [
    "conv2d_elu",
    "equilibrium_update",
    "l1_reconstruction_loss",
    "normalize_images",
    "reference",
    "upsample_conv2d_elu",
]
