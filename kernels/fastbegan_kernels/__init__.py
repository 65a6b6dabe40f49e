"""Layers and losses of auto-encoder GANs as plain functions over tensors.

Every function has a plain PyTorch twin of the same name in `fastbegan_kernels.reference`, which is its
specification; `impl=` (or the environment variable FASTBEGAN_IMPL) chooses between the tiers.
"""

from . import layers, losses, reference
from .conv2d_elu import conv2d_elu
from .conv_stage import conv_stage
from .equilibrium_update import equilibrium_update
from .fold import fold
from .group_norm_silu import group_norm_silu
from .l1_reconstruction_loss import l1_reconstruction_loss, l1_reconstruction_loss_with_gradients
from .normalize_images import normalize_images
from .skip_phase_table import skip_phase_table
from .upsample_conv2d_elu import upsample_conv2d_elu

__all__ = [
    "conv2d_elu",
    "conv_stage",
    "equilibrium_update",
    "fold",
    "group_norm_silu",
    "l1_reconstruction_loss",
    "l1_reconstruction_loss_with_gradients",
    "layers",
    "losses",
    "normalize_images",
    "reference",
    "skip_phase_table",
    "upsample_conv2d_elu",
]
