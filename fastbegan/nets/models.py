"""Encoder, Decoder (= Generator) and Discriminator of BEGAN (paper §3.5), on the fast layers.

Each computes what its namesake in `plain` does, from the same state dict. A forward runs on packed weights (`pack`):
folded, cast and laid out for the layers. Given none it packs its own; a training step packs once and gives them to
every pass. Inside all maps are channels_last, and so are the images that come out and the gradients at images.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fastbegan_kernels import conv_stage, fold, reference, skip_phase_table
from fastbegan_kernels.dispatch import asked_for

from .. import plain
from ..config import ModelConfig
from ..layers import Conv2dELU, UpsampleConv2dELU
from .hub import HubMixin

Packed = dict[str, Tensor]
"""A net's weights as its layers take them, by the names of its parameters, and `levels.N.skip` of skip tables."""
Part = tuple[str, Tensor, str]
"""Name, weight [K, C, k, k] and the kind that `fold` packs it as, or "cast" for what is only cast."""


class _Net(nn.Module, ABC):
    """What the nets share. `carry` is the input's share in vanishing residuals (§3.5.1), None without them."""

    carry: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # in the state dict, so that a generator exported while layers still fade in samples as it trained
        self.register_buffer("carry", torch.ones(()) if config.vanishing else None)

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """The weights to pack."""

    def biases(self) -> Iterator[tuple[str, Tensor]]:
        """The biases, which stay as they are."""
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                yield name, parameter

    def pack(self, dtype: torch.dtype | None = None) -> Packed:
        """The weights in `dtype` (None: their own), with a graph back to them; biases in their own type."""
        parts = list(self.parts())
        if asked_for(None) == "reference":  # it takes weights as they are
            return {name: weight.to(dtype or weight.dtype) for name, weight, _ in parts} | dict(self.biases())
        names, weights, kinds = zip(*(part for part in parts if part[2] != "cast"), strict=True)
        # folded where they are: at other addresses in every step they could not be part of a CUDA graph
        packed = dict(zip(names, fold(weights, kinds, dtype=dtype), strict=True))
        for name, weight, kind in parts:
            if kind == "cast":
                packed[name] = weight.to(dtype=dtype or weight.dtype, memory_format=torch.channels_last)
        return packed | dict(self.biases())

    def _chain(
        self, x: Tensor, packed: Sequence[Packed], layers: dict[str, Conv2dELU], skip: Tensor | None = None
    ) -> Tensor:  # fmt: skip
        """Layers one after another; `skip` belongs to the last. One stage, or with a carry a stage a layer."""
        if self.carry is not None and len(layers) > 1:
            *first, last = layers.items()
            for name, layer in first:
                x = self._chain(x, packed, {name: layer})
            return self._chain(x, packed, dict([last]), skip)
        y = conv_stage(
            x,
            [weights[f"{name}.weight"] for weights in packed for name in layers],
            [weights[f"{name}.bias"] for weights in packed for name in layers],
            kinds=[layer.kind for layer in layers.values()],
            skip=skip,
            activation=[layer.activation for layer in layers.values()],
            copies=len(packed),
        )
        (*_, layer) = layers.values()
        if self.carry is None or not layer.residual:
            return y
        return reference.blend(F.interpolate(x, scale_factor=2.0) if layer.kind == "up" else x, y, self.carry)


def _linear(x: Tensor, packed: Sequence[Packed], name: str) -> Tensor:
    """A linear layer whose weight was packed as a convolution that sees all of its input at once."""
    parts = []
    for part, weights in zip(x.chunk(len(packed)), packed, strict=True):
        weight = weights[f"{name}.weight"].permute(0, 2, 3, 1).flatten(1)
        parts.append(F.linear(part, weight, weights[f"{name}.bias"].to(weight.dtype)))
    return parts[0] if len(parts) == 1 else torch.cat(parts)


class Encoder(_Net):
    """Images [N, 3, size, size] -> codes [N, hidden], no activation at the end.

    Each level has `repeats` convolutions; the last of them changes the width and, but on the 8x8 level, halves the
    resolution by stride 2 (a conv followed by sub-sampling is that conv at stride 2). With `recompute` the stem and the
    first level, the largest, are computed again in the backward instead of kept.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.recompute = False
        self.stem = Conv2dELU(3, config.filters)
        self.stem.residual = False  # with 3 filters it would look like one
        self.levels = nn.ModuleList()
        channels = config.filters
        for level, width in enumerate(config.level_channels):
            last = level == len(config.level_channels) - 1
            convs = [Conv2dELU(channels, channels) for _ in range(config.repeats - 1)]
            convs.append(Conv2dELU(channels, width, stride=1 if last else 2))
            self.levels.append(nn.ModuleList(convs))
            channels = width
        self.code = nn.Linear(64 * channels, config.hidden)

    def parts(self) -> Iterator[Part]:
        for name, layer in {"stem": self.stem, **_layers(self.levels)}.items():
            yield f"{name}.weight", layer.weight, "conv"
        yield "code.weight", self.code.weight.unflatten(1, (-1, 8, 8)), "cast"  # then channels_last needs no transpose

    def forward(self, images: Tensor, *packed: Packed) -> Tensor:
        """With several packed copies the batch is as many parts; each part's gradients go to its own copy."""
        packed = packed or (self.pack(),)
        layers = {"stem": self.stem, **_layers(self.levels)}
        first = {name: layer for name, layer in layers.items() if name.startswith(("stem", "levels.0."))}
        rest = {name: layer for name, layer in layers.items() if name not in first}
        x = images.to(packed[0]["stem.weight"].dtype)
        if self.recompute and torch.is_grad_enabled():
            x = checkpoint(self._chain, x, packed, first, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(x, Tensor)
            x = self._chain(x, packed, rest) if rest else x
        else:
            x = self._chain(x, packed, first | rest)
        return _linear(x.permute(0, 2, 3, 1).flatten(1), packed, "code")


class Decoder(_Net):
    """Codes [N, hidden] -> images [N, 3, size, size], linear at the end (clip only when saving).

    With skips, h0 (the 8x8 tensor) is upsampled and concatenated after every upsampling (§3.5.1). At the first level
    that is a concatenation at 8x8, before the layer that doubles both; from the second on, what the layer would make of
    h0 is a table at 8x8 (`skip_phase_table`), and the wide tensor never exists.
    """

    def __init__(self, config: ModelConfig, inputs: int | None = None) -> None:
        super().__init__(config)
        n = config.filters
        self.expand = nn.Linear(config.hidden if inputs is None else inputs, 64 * n)
        self.levels = nn.ModuleList()
        for level in range(len(config.level_channels)):
            first = UpsampleConv2dELU(2 * n if config.skips else n, n) if level else Conv2dELU(n, n)
            rest = (Conv2dELU(n, n) for _ in range(config.repeats - 1))
            self.levels.append(nn.ModuleList([first, *rest]))
        self.image = Conv2dELU(n, 3, activation="none")
        self.image.residual = False

    def parts(self) -> Iterator[Part]:
        n = self.config.filters
        # pixel by pixel instead of channel by channel: h0 comes out channels_last
        expand = self.expand.weight.unflatten(0, (n, 64)).transpose(0, 1).flatten(0, 1)
        yield "expand.weight", expand[..., None, None], "cast"
        for name, layer in _layers(self.levels).items():
            if self._has_table(name):
                yield f"{name}.weight", layer.weight[:, :n], "up"
                yield f"{name}.skip", layer.weight[:, n:], "skip"
            else:
                yield f"{name}.weight", layer.weight, "up" if layer.kind == "up" else "conv"
        yield "image.weight", self.image.weight, "conv"

    def biases(self) -> Iterator[tuple[str, Tensor]]:
        for name, bias in super().biases():
            yield name, bias.unflatten(0, (-1, 64)).t().flatten() if name == "expand.bias" else bias

    def _has_table(self, name: str) -> bool:
        _, level, number = name.split(".")
        return self.config.skips and int(level) > 1 and number == "0"

    def forward(self, code: Tensor, *packed: Packed) -> Tensor:
        """With several packed copies the batch is as many parts; each part's gradients go to its own copy."""
        packed = packed or (self.pack(),)
        h0 = _linear(code.to(packed[0]["expand.weight"].dtype), packed, "expand")
        h0 = h0.unflatten(1, (8, 8, -1)).permute(0, 3, 1, 2)  # [N, n, 8, 8]
        x = h0
        waiting: dict[str, Conv2dELU] = {}
        for name, layer in _layers(self.levels).items():
            if name == "levels.1.0" and self.config.skips:
                x, waiting = torch.cat((self._chain(x, packed, waiting), h0), 1), {}
            waiting[name] = layer
            if self._has_table(name):
                x, waiting = self._chain(x, packed, waiting, self._table(h0, packed, f"{name}.skip")), {}
        return self._chain(x, packed, waiting | {"image": self.image})

    def _table(self, h0: Tensor, packed: Sequence[Packed], name: str) -> Tensor:
        parts = zip(h0.chunk(len(packed)), packed, strict=True)
        tables = [skip_phase_table(part, weights[name]) for part, weights in parts]
        return tables[0] if len(tables) == 1 else torch.cat(tables)


class Generator(Decoder, HubMixin):
    """Latents z [N, latent], uniform in [-1, 1] -> images [N, 3, size, size]: a Decoder with its own weights."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, inputs=config.latent)


class Discriminator(_Net, HubMixin):
    """The auto-encoder D(v) = Decoder(Encoder(v)): [N, 3, size, size] -> [N, 3, size, size]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        self.carry = None
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)

    def parts(self) -> Iterator[Part]:
        for prefix, net in (("encoder.", self.encoder), ("decoder.", self.decoder)):
            yield from ((prefix + name, weight, kind) for name, weight, kind in net.parts())

    def biases(self) -> Iterator[tuple[str, Tensor]]:
        for prefix, net in (("encoder.", self.encoder), ("decoder.", self.decoder)):
            yield from ((prefix + name, bias) for name, bias in net.biases())

    def forward(self, images: Tensor, *packed: Packed) -> Tensor:
        """With several packed copies the batch is as many parts; each part's gradients go to its own copy."""
        packed = packed or (self.pack(),)
        code = self.encoder(images, *(_of(weights, "encoder.") for weights in packed))
        return self.decoder(code, *(_of(weights, "decoder.") for weights in packed))


def _of(packed: Packed, prefix: str) -> Packed:
    return {name.removeprefix(prefix): weight for name, weight in packed.items() if name.startswith(prefix)}


def _layers(levels: nn.Module) -> dict[str, Conv2dELU]:
    assert isinstance(levels, nn.ModuleList)
    found = {}
    for level, convs in enumerate(levels):
        assert isinstance(convs, nn.ModuleList)
        for number, conv in enumerate(convs):
            assert isinstance(conv, Conv2dELU)
            found[f"levels.{level}.{number}"] = conv
    return found


def build(config: ModelConfig, *, seed: int, device: torch.device | str = "cpu") -> tuple[Generator, Discriminator]:
    """G and D with weights that depend on `seed` only (made on the CPU), in channels_last, on `device`."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, discriminator = Generator(config), Discriminator(config)
    nets = (generator, discriminator)
    for net in nets:
        net.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return nets


PlainNet = TypeVar("PlainNet", bound=nn.Module)


def to_plain(net: Generator | Discriminator, *, share: bool = False) -> plain.Generator | plain.Discriminator:
    """The same net as ordinary PyTorch modules (`plain`), with copies of its weights, or with `share` the very same."""
    made = plain.Generator(net.config) if isinstance(net, Generator) else plain.Discriminator(net.config)
    made.train(net.training)
    values = dict(net.named_parameters()) | dict(net.named_buffers())
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        module = made.get_submodule(owner)
        setattr(module, name, value if share else copy.deepcopy(value))
    return made


def count_parameters(*modules: nn.Module) -> int:
    """Number of trainable values, biases included."""
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
