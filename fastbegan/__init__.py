"""fastbegan: BEGAN (Berthelot, Schumm, Metz 2017) and the layers under auto-encoder GANs, built for throughput."""

__version__ = "0.1.0"

from . import plain
from .config import PRESETS, ModelConfig, Preset, TrainConfig
from .equilibrium import Equilibrium
from .errors import UserError
from .layers import Conv2dELU, UpsampleConv2dELU
from .models import Decoder, Discriminator, Encoder, Generator, to_plain
from .step import TrainStep

__all__ = [
    "PRESETS",
    "Conv2dELU",
    "Decoder",
    "Discriminator",
    "Encoder",
    "Equilibrium",
    "Generator",
    "ModelConfig",
    "Preset",
    "TrainConfig",
    "TrainStep",
    "UpsampleConv2dELU",
    "UserError",
    "plain",
    "to_plain",
]
