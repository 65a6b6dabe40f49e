"""Small nets in the styles of published ones, written anew: what people bring to `accelerate`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from . import carpedm20, cyclegan, diffusers_nets, ganomaly, introvae, lightweight_gan, pix2pix, vqgan, vqvae2

Example = Callable[[int], Any]


@dataclass(frozen=True)
class Net:
    """One net, small for tests and larger for timing."""

    make: Callable[[], nn.Module]
    """The net with weights from torch's generator, which the caller seeds."""
    example: Example
    """Its input, or a tuple of arguments, by batch size."""
    larger: Callable[[], nn.Module]
    larger_example: Example
    pairs: dict[str, int]
    """By kind, how many pairs one forward of the small net has: "up", "activation" and "norm" of `pairs.Pairs`."""
    shared: int = 0
    """Nearest upsamplings that a convolution and something else read."""
    channels_last: bool = True
    """False where a view of a map raises in this format, as in the original."""
    marks: tuple[pytest.MarkDecorator, ...] = ()


def normal(*shape: int) -> Example:
    return lambda batch: torch.randn(batch, *shape, generator=torch.Generator().manual_seed(batch))


def images(size: int, channels: int = 3) -> Example:
    return normal(channels, size, size)


def run(model: nn.Module, example: Any) -> Any:
    return model(*example) if isinstance(example, tuple) else model(example)


def _with_loss(size: int) -> Callable[[int], tuple[Tensor, bool]]:
    return lambda batch: (images(size)(batch), True)


def _net(
    make: Callable[..., nn.Module],
    example: Example,
    larger: dict[str, Any],
    larger_example: Example,
    pairs: tuple[int, int, int] = (0, 0, 0),
    **more: Any,
) -> Net:
    """A net that `make` gives by itself, and larger with options."""
    up, activation, norm = pairs
    counts = {"up": up, "activation": activation, "norm": norm}
    return Net(make, example, partial(make, **larger), larger_example, counts, **more)


_GANOMALY = {"isize": 64, "nz": 100, "width": 64}
_LIGHTWEIGHT = {
    "image_size": 64,
    "latent_dim": 128,
    "fmap_max": 160,
    "fmap_inverse_coef": 11,
    "sle_map": ((2, 5), (3, 6)),
}
_VQVAE2 = {"channel": 128, "n_res_channel": 32, "embed_dim": 64, "n_embed": 512}
_BEGAN = {"z_num": 64, "hidden_num": 80, "repeat_num": 4}
_UNET, _RESNET = {"num_downs": 7, "ngf": 32}, {"ngf": 32, "n_blocks": 6}
_VQGAN = {"ch": 64, "mult": (1, 1, 2, 2), "resolution": 64}
_INTROVAE = {"hdim": 128, "channels": (48, 96, 128, 256), "image_size": 64}
_DIFFUSERS = (
    pytest.mark.skipif(find_spec("diffusers") is None, reason="needs diffusers"),
    pytest.mark.xdist_group("diffusers"),
)

_unet, _resnet, _began = pix2pix.UnetGenerator, cyclegan.ResnetGenerator, carpedm20.DiscriminatorCNN
_upsampling = partial(_resnet, upsample=True, padding_type="zero", use_dropout=True)
_lightweight, _lightweight_d = lightweight_gan.Generator, lightweight_gan.Discriminator
_kl, _vq, _tiny = diffusers_nets.autoencoder_kl, diffusers_nets.vq_model, diffusers_nets.autoencoder_tiny
_stable = diffusers_nets.stable_diffusion_depth
_three = {"channels": (64, 128, 128)}

NETS: dict[str, Net] = {
    "vqgan_encoder": _net(vqgan.Encoder, images(32), _VQGAN, images(64), (0, 0, 11)),
    "vqgan_decoder": _net(vqgan.Decoder, images(8, 8), _VQGAN, images(8, 8), (2, 0, 17)),
    "introvae": _net(introvae.IntroVAE, images(32), _INTROVAE, images(64), shared=3, channels_last=False),
    "pix2pix": _net(_unet, images(64), _UNET, images(128)),
    "pix2pix_upsample": _net(partial(_unet, up="zero"), images(64), _UNET, images(128), (6, 0, 0)),
    "pix2pix_reflect": _net(partial(_unet, up="reflect"), images(64), _UNET, images(128)),
    "pix2pix_patchgan": _net(pix2pix.NLayerDiscriminator, images(32, 6), {"ndf": 64}, images(128, 6)),
    "ganomaly": _net(ganomaly.NetG, images(32), _GANOMALY, images(64)),
    "cyclegan": _net(_resnet, images(32), _RESNET, images(64)),
    "cyclegan_upsample": _net(_upsampling, images(32), _RESNET, images(64), (2, 0, 0)),
    "lightweight_gan": _net(_lightweight, normal(16), _LIGHTWEIGHT, normal(128), (3, 2, 0)),
    "lightweight_gan_shuffle": _net(
        partial(_lightweight, shuffle=True), normal(16), _LIGHTWEIGHT, normal(128), (0, 5, 0)
    ),
    "lightweight_gan_discriminator": _net(
        _lightweight_d, _with_loss(64), {"image_size": 128, "width": 32}, _with_loss(128), (3, 7, 0)
    ),
    "vqvae2": _net(vqvae2.VQVAE, images(32), _VQVAE2, images(96), (0, 8, 0)),
    "vqvae2_nearest": _net(partial(vqvae2.VQVAE, nearest=True), images(32), _VQVAE2, images(96), (4, 9, 0)),
    "carpedm20_generator": _net(carpedm20.GeneratorCNN, normal(16), _BEGAN, normal(64), (2, 6, 0)),
    "carpedm20_discriminator": _net(_began, images(32), _BEGAN, images(64), (2, 13, 0), channels_last=False),
    "carpedm20_discriminator_pooled": _net(
        partial(_began, pool=True), images(32), _BEGAN, images(64), (2, 13, 0), channels_last=False
    ),
    "autoencoder_kl": _net(_kl, images(32), _three, images(64), (1, 0, 22), marks=_DIFFUSERS),
    "stable_diffusion": _net(_stable, images(16), {}, images(32), (3, 0, 50), marks=(*_DIFFUSERS, pytest.mark.slow)),
    "vq_model": _net(_vq, images(32), _three, images(64), (1, 0, 22), marks=_DIFFUSERS),
    "autoencoder_tiny": _net(
        _tiny, images(32), {"width": 64, "blocks": (1, 3, 3, 3)}, images(64), (2, 13, 0), marks=_DIFFUSERS
    ),
}
# for pytest.mark.parametrize, with the marks of each net
PARAMETERS = [pytest.param(net, id=name, marks=net.marks) for name, net in NETS.items()]
