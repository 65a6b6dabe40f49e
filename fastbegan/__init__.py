"""fastbegan: BEGAN (Berthelot, Schumm, Metz 2017) and the layers under auto-encoder GANs, built for throughput."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

from .version import __version__ as __version__

if TYPE_CHECKING:
    from . import layers, plain
    from .config import PRESETS, ModelConfig, Preset, TrainConfig
    from .convert import accelerate, restore
    from .errors import UserError
    from .layers import Conv2dELU, Equilibrium, UpsampleConv2dELU
    from .nets.models import Decoder, Discriminator, Encoder, Generator, build, to_plain
    from .training.step import TrainStep


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
    "accelerate",
    "build",
    "layers",
    "plain",
    "restore",
    "to_plain",
]

# loaded when asked for (PEP 562): the processes that decode pictures come here too and have no use for torch
_HOMES = {
    "config": ("PRESETS", "ModelConfig", "Preset", "TrainConfig"),
    "convert": ("accelerate", "restore"),
    "errors": ("UserError",),
    "layers": ("Conv2dELU", "Equilibrium", "UpsampleConv2dELU"),
    "nets.models": ("Decoder", "Discriminator", "Encoder", "Generator", "build", "to_plain"),
    "training.step": ("TrainStep",),
}


def __getattr__(name: str) -> object:
    if name in ("layers", "plain"):
        return importlib.import_module(f".{name}", __name__)
    for module, names in _HOMES.items():
        if name in names:
            return getattr(importlib.import_module(f".{module}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
