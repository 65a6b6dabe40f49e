"""Auto-encoders of diffusers with random weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn


def _blocks(channels: Sequence[int], layers: int) -> dict[str, Any]:
    return {
        "block_out_channels": tuple(channels),
        "layers_per_block": layers,
        "down_block_types": ("DownEncoderBlock2D",) * len(channels),
        "up_block_types": ("UpDecoderBlock2D",) * len(channels),
    }


def autoencoder_kl(channels: Sequence[int] = (32, 64), layers: int = 1, latent: int = 4) -> nn.Module:
    from diffusers import AutoencoderKL

    return AutoencoderKL(latent_channels=latent, **_blocks(channels, layers))


def stable_diffusion_depth() -> nn.Module:
    """The auto-encoder of Stable Diffusion in depth and width, 84 million weights."""
    return autoencoder_kl((128, 256, 512, 512), layers=2)


def vq_model(channels: Sequence[int] = (32, 64), layers: int = 1, latent: int = 3) -> nn.Module:
    from diffusers import VQModel

    return VQModel(latent_channels=latent, **_blocks(channels, layers))


def autoencoder_tiny(width: int = 32, blocks: Sequence[int] = (1, 1, 1)) -> nn.Module:
    """TAESD's structure; it rounds its codes to bytes, so that no gradient reaches the encoder."""
    from diffusers import AutoencoderTiny

    return AutoencoderTiny(
        encoder_block_out_channels=(width,) * len(blocks),
        decoder_block_out_channels=(width,) * len(blocks),
        num_encoder_blocks=tuple(blocks),
        num_decoder_blocks=tuple(reversed(blocks)),
    )
