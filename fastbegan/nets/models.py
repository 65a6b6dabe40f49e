"""Encoder, Decoder (= Generator) and Discriminator of BEGAN (paper §3.5), on the fast layers.

Each computes what its namesake in `plain` computes, from the same state dict. A forward runs on packed weights
(`pack`): folded, cast and laid out for the layers. Without any it packs its own weights. A training step packs once and
passes the result to every forward. Feature maps, output images and gradients at images are channels_last.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import NamedTuple

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
"""A net's weights as its layers take them, by the names of its parameters, and `levels.N.0.skip` of skip tables."""
Part = tuple[str, Tensor, str]
"""Name, weight [K, C, k, k] and the kind that `fold` packs it as, or "cast" for a weight that is only cast."""


class _Unit(NamedTuple):
    """A convolution of a net. `name` is that of its parameters; `first` says whether it begins its level."""

    name: str
    layer: Conv2dELU
    level: int
    first: bool = False


class _Net(nn.Module, ABC):
    """The part that all nets share.

    `carry` is the share of the input in vanishing residuals (§3.5.1), a scalar in [0, 1]; None without them.

    Args:
        config: Size, widths and kinds of the layers.
    """

    carry: Tensor | None

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        # in the state dict, so that a generator exported while layers still fade in samples as it trained
        self.register_buffer("carry", torch.ones(()) if config.vanishing else None)

    @abstractmethod
    def parts(self) -> Iterator[Part]:
        """List the weights to pack.

        Yields:
            Part: Name, weight and kind of packing.
        """

    def biases(self) -> Iterator[tuple[str, Tensor]]:
        """List the biases, which are not packed.

        Yields:
            tuple[str, Tensor]: Name and values.
        """
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                yield name, parameter

    def pack(self, dtype: torch.dtype | None = None) -> Packed:
        """Fold, cast and lay out the weights for the layers. The result has a graph back to the parameters.

        Args:
            dtype: Type of the packed weights; None keeps their own. Biases always keep theirs.

        Returns:
            Tensors by parameter name: folded convolutions, linear weights as channels_last 1x1 or 8x8 convolutions, and
            biases. `levels.N.0.skip` is the part of a weight from which a skip table is computed.
        """
        parts = list(self.parts())
        if asked_for(None) == "reference":  # it takes weights as they are
            return {name: weight.to(dtype or weight.dtype) for name, weight, _ in parts} | dict(self.biases())
        names, weights, kinds = zip(*(part for part in parts if part[2] != "cast"), strict=True)
        # without a copy first: at another address in every step, weights could not be part of a CUDA graph
        packed = dict(zip(names, fold(weights, kinds, dtype=dtype), strict=True))
        for name, weight, kind in parts:
            if kind == "cast":
                packed[name] = weight.to(dtype=dtype or weight.dtype, memory_format=torch.channels_last)
        return packed | dict(self.biases())

    def _chain(self, x: Tensor, packed: Sequence[Packed], units: Sequence[_Unit], skip: Tensor | None = None) -> Tensor:
        """Run `units` one after another as one stage, with a carry as a stage each. `skip` is the last one's table."""
        if self.carry is not None and len(units) > 1:
            for unit in units[:-1]:
                x = self._chain(x, packed, [unit])
            return self._chain(x, packed, units[-1:], skip)
        y = conv_stage(
            x,
            [weights[f"{unit.name}.weight"] for weights in packed for unit in units],
            [weights[f"{unit.name}.bias"] for weights in packed for unit in units],
            kinds=[unit.layer.kind for unit in units],
            skip=skip,
            activation=[unit.layer.activation for unit in units],
            copies=len(packed),
        )
        layer = units[-1].layer
        if self.carry is None or not layer.residual:
            return y
        return reference.blend(F.interpolate(x, scale_factor=2.0) if layer.kind == "up" else x, y, self.carry)


def _linear(x: Tensor, packed: Sequence[Packed], name: str) -> Tensor:
    """A linear layer whose weight was packed as a convolution over all of its input at once."""
    outputs = []
    for chunk, weights in zip(x.chunk(len(packed)), packed, strict=True):
        weight = weights[f"{name}.weight"].permute(0, 2, 3, 1).flatten(1)
        outputs.append(F.linear(chunk, weight, weights[f"{name}.bias"].to(weight.dtype)))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _units(levels: nn.Module) -> Iterator[_Unit]:
    assert isinstance(levels, nn.ModuleList)
    for level, convs in enumerate(levels):
        assert isinstance(convs, nn.ModuleList)
        for number, conv in enumerate(convs):
            assert isinstance(conv, Conv2dELU)
            yield _Unit(f"levels.{level}.{number}", conv, level, first=number == 0)


class Encoder(_Net):
    """Images [N, 3, size, size] -> codes [N, hidden], without an activation at the end (§3.5).

    Each level has `config.repeats` convolutions. The last of them changes the width and halves the resolution by
    stride 2, except on the 8x8 level. (Sub-sampling after a convolution is that convolution at stride 2.)

    Args:
        config: Size, widths and kinds of the layers.

    Attributes:
        recompute: Compute the stem and the first level, the largest, again in the backward instead of keeping their
            outputs. False at first; it may be changed at any time.
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

    def _all_units(self) -> list[_Unit]:
        return [_Unit("stem", self.stem, 0), *_units(self.levels)]

    def parts(self) -> Iterator[Part]:
        for unit in self._all_units():
            yield f"{unit.name}.weight", unit.layer.weight, "conv"
        yield "code.weight", self.code.weight.unflatten(1, (-1, 8, 8)), "cast"  # then channels_last needs no transpose

    def forward(self, images: Tensor, *packed: Packed) -> Tensor:
        """Encode images.

        Args:
            images: [N, 3, size, size] in [-1, 1], any floating-point type and memory format.
            *packed: Results of `pack`, none for the net's own weights. With n of them the batch is n equal chunks;
                the gradients of chunk i go to result i.

        Returns:
            Codes [N, hidden] in the type of the packed weights.
        """
        packed = packed or (self.pack(),)
        units = self._all_units()
        x = images.to(packed[0]["stem.weight"].dtype)
        if self.recompute and torch.is_grad_enabled():
            large = [unit for unit in units if unit.level == 0]
            units = units[len(large) :]
            recomputed = checkpoint(self._chain, x, packed, large, use_reentrant=False, preserve_rng_state=False)
            assert isinstance(recomputed, Tensor)
            x = recomputed
        x = self._chain(x, packed, units) if units else x
        return _linear(x.permute(0, 2, 3, 1).flatten(1), packed, "code")


class Decoder(_Net):
    """Codes [N, hidden] -> images [N, 3, size, size], linear at the end; clip only to save them (§3.5).

    With `config.skips`, h0 (the first 8x8 map) is upsampled and concatenated after every upsampling (§3.5.1). At level
    1 the two are concatenated at 8x8, before the layer that upsamples both. From level 2 on, the layer's part for h0 is
    a table computed at 8x8 (`skip_phase_table`), so the wide concatenation is never made.

    Args:
        config: Size, widths and kinds of the layers.
        inputs: Length of a code; None means `config.hidden`.
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

    def _all_units(self) -> list[_Unit]:
        return [*_units(self.levels), _Unit("image", self.image, len(self.levels) - 1)]

    def _has_table(self, unit: _Unit) -> bool:
        return self.config.skips and unit.first and unit.level > 1

    def parts(self) -> Iterator[Part]:
        n = self.config.filters
        # pixel by pixel instead of channel by channel: h0 comes out channels_last
        expand = self.expand.weight.unflatten(0, (n, 64)).transpose(0, 1).flatten(0, 1)
        yield "expand.weight", expand[..., None, None], "cast"
        for unit in self._all_units():
            name, weight = unit.name, unit.layer.weight
            if self._has_table(unit):
                yield f"{name}.weight", weight[:, :n], "up"
                yield f"{name}.skip", weight[:, n:], "skip"
            else:
                yield f"{name}.weight", weight, "up" if unit.layer.kind == "up" else "conv"

    def biases(self) -> Iterator[tuple[str, Tensor]]:
        for name, bias in super().biases():
            yield name, bias.unflatten(0, (-1, 64)).t().flatten() if name == "expand.bias" else bias

    def forward(self, code: Tensor, *packed: Packed) -> Tensor:
        """Decode codes.

        Args:
            code: [N, inputs], any floating-point type.
            *packed: Results of `pack`, none for the net's own weights. With n of them the batch is n equal chunks;
                the gradients of chunk i go to result i.

        Returns:
            Images [N, 3, size, size], channels_last, not clipped, in the type of the packed weights.
        """
        packed = packed or (self.pack(),)
        h0 = _linear(code.to(packed[0]["expand.weight"].dtype), packed, "expand")
        h0 = h0.unflatten(1, (8, 8, -1)).permute(0, 3, 1, 2)  # [N, n, 8, 8]
        x = h0
        pending: list[_Unit] = []
        for unit in self._all_units():
            if self.config.skips and unit.first and unit.level == 1:
                x, pending = torch.cat((self._chain(x, packed, pending), h0), 1), []
            pending.append(unit)
            if self._has_table(unit):
                x, pending = self._chain(x, packed, pending, self._table(h0, packed, f"{unit.name}.skip")), []
        return self._chain(x, packed, pending)

    def _table(self, h0: Tensor, packed: Sequence[Packed], name: str) -> Tensor:
        chunks = zip(h0.chunk(len(packed)), packed, strict=True)
        tables = [skip_phase_table(chunk, weights[name]) for chunk, weights in chunks]
        return tables[0] if len(tables) == 1 else torch.cat(tables)


class Generator(Decoder, HubMixin):
    """Latents z [N, latent], uniform in [-1, 1] -> images [N, 3, size, size]: a Decoder with its own weights (§3.5).

    Args:
        config: Size, widths and kinds of the layers.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config, inputs=config.latent)


class Discriminator(_Net, HubMixin):
    """The auto-encoder D(v) = Decoder(Encoder(v)): [N, 3, size, size] -> [N, 3, size, size] (§3.1, §3.5).

    Args:
        config: Size, widths and kinds of the layers.
    """

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
        """Reconstruct images.

        Args:
            images: [N, 3, size, size] in [-1, 1], any floating-point type and memory format.
            *packed: Results of `pack`, none for the net's own weights. With n of them the batch is n equal chunks;
                the gradients of chunk i go to result i.

        Returns:
            Reconstructions [N, 3, size, size], channels_last, not clipped, in the type of the packed weights.
        """
        packed = packed or (self.pack(),)
        code = self.encoder(images, *(_of(weights, "encoder.") for weights in packed))
        return self.decoder(code, *(_of(weights, "decoder.") for weights in packed))


def _of(packed: Packed, prefix: str) -> Packed:
    return {name.removeprefix(prefix): weight for name, weight in packed.items() if name.startswith(prefix)}


def build(config: ModelConfig, *, seed: int, device: torch.device | str = "cpu") -> tuple[Generator, Discriminator]:
    """Make G and D with torch's first weights, times `init_scale`.

    The global random state is neither read nor changed.

    Args:
        config: Size, widths and kinds of the layers of both, and the scale of their first weights.
        seed: Decides all weights. They are drawn on the CPU, so they are equal on every device.
        device: Where the nets end up.

    Returns:
        Generator and Discriminator in float32, channels_last, in training mode.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        generator, discriminator = Generator(config), Discriminator(config)
    nets = (generator, discriminator)
    for net in nets:
        weights = [parameter.data for parameter in net.parameters() if parameter.dim() > 1]
        torch._foreach_mul_(weights, config.init_scale)
        net.to(device=device, memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    return nets


def to_plain(net: Generator | Discriminator, *, share: bool = False) -> plain.Generator | plain.Discriminator:
    """Make the same net of ordinary PyTorch modules (`fastbegan.plain`).

    Args:
        net: The net on the fast layers; it is not changed.
        share: Use the very same parameters and buffers instead of copies.

    Returns:
        A net with equal outputs and an equal state dict, in the mode (training or eval) of `net`.
    """
    twin = plain.Generator(net.config) if isinstance(net, Generator) else plain.Discriminator(net.config)
    twin.train(net.training)
    values = dict(net.named_parameters()) | dict(net.named_buffers())
    for path, value in values.items():
        owner, _, name = path.rpartition(".")
        setattr(twin.get_submodule(owner), name, value if share else copy.deepcopy(value))
    return twin


def count_parameters(*modules: nn.Module) -> int:
    """Count trainable values.

    Args:
        *modules: Modules that share no parameters.

    Returns:
        The number of values in all parameters, biases included.
    """
    return sum(parameter.numel() for module in modules for parameter in module.parameters())
