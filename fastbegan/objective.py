"""The gradients of both players (paper §3.3): L_D = L(x) - k L(G(z_D)) on D and L_G = L(G(z_G)) on G."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from fastbegan_kernels import l1_reconstruction_loss

from .models import Discriminator, Generator


@contextlib.contextmanager
def frozen(module: nn.Module) -> Iterator[None]:
    """Inside, `module` gets no weight gradients; gradients still pass through it."""
    parameters = list(module.parameters())
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class Objective:
    """Adds gradients to the `.grad` of both nets, scaled by `loss_scale` where one is given; updates nothing.

    `dtype` is the compute type of both nets under autocast (None: that of their weights). Losses are float32 (float64
    for float64 nets), means over the batch, images in [-1, 1]. Every method returns losses without their graph.
    """

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        *,
        eta: int = 1,
        dtype: torch.dtype | None = None,
        loss_scale: Tensor | None = None,
    ) -> None:
        self.generator, self.discriminator = generator, discriminator
        self.eta, self.dtype, self.loss_scale = eta, dtype, loss_scale

    def shared(self, real: Tensor, z: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Both players' gradients for z_D = z_G at the same parameters; returns L(x) and L(G(z)).

        Both need the gradients of the same two losses, so D runs once an image: the backward of L(G(z)) leaves G's
        gradient on G and F on D; D's is scaled by -k; the backward of L(x) adds R, and D holds R - k F. Never divided
        by k, which starts at 0. D's `.grad` must be None before.
        """
        loss_fake = self.loss(self._run(self.generator, z))
        self._backward(loss_fake)
        gradients = [p.grad for p in self.discriminator.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, k.neg().to(gradients[0].dtype))
        loss_real = self.loss(real)
        self._backward(loss_real)
        return loss_real.detach(), loss_fake.detach()

    def for_discriminator(self, real: Tensor, z: Tensor, k: Tensor) -> Tensor:
        """Gradient of L_D on D; returns L(x)."""
        with torch.no_grad():
            fake = self._run(self.generator, z)
        loss_real = self.loss(real)
        self._backward(loss_real - k * self.loss(fake))
        return loss_real.detach()

    def for_generator(self, z: Tensor) -> Tensor:
        """Gradient of L_G on G, through both sides of |v - D(v)|; returns L(G(z))."""
        with frozen(self.discriminator):
            loss = self.loss(self._run(self.generator, z))
            self._backward(loss)
        return loss.detach()

    def loss(self, images: Tensor) -> Tensor:
        """L(v), the mean reconstruction loss of images [N, 3, H, W], with its graph."""
        prediction = self._run(self.discriminator, images)
        return l1_reconstruction_loss(prediction, images, eta=self.eta).mean()

    def _run(self, net: nn.Module, x: Tensor) -> Tensor:
        if self.dtype is None:
            return net(x)
        with torch.autocast(x.device.type, self.dtype):
            return net(x)

    def _backward(self, loss: Tensor) -> None:
        (loss if self.loss_scale is None else loss * self.loss_scale).backward()
