"""One training step: both losses, their gradients, both updates, k, and the averaged generator.

Nothing in here waits for the device. A step whose numbers are not finite changes nothing: a flag on the device holds
back both optimizers, the average and k, from that step on, until the host reads it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import Any

import torch
from fastbegan_kernels import l1_reconstruction_loss
from torch import Tensor, nn

from .config import TrainConfig
from .equilibrium import Equilibrium
from .models import Discriminator, Generator

# fp16 only: scale of the losses so that small gradients do not vanish, as torch.amp.GradScaler starts it
_FIRST_LOSS_SCALE, _GROW_AFTER = 2.0**16, 2000


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


class TrainStep(nn.Module):
    """State and work of one step. Call it with a batch in [-1, 1] and one draw of z for each player.

    Simultaneous updates with shared z need L(x) and L(G(z)) at the same parameters only, so D runs once an image:
    `L(G(z)).backward()` leaves G's gradient on G and F on D; D's is scaled by -k; `L(x).backward()` adds R, and D
    holds R - k F, the gradient of L_D. Never divided by k, which starts at 0.
    """

    found_bad: Tensor
    bad_step: Tensor
    loss_scale: Tensor
    good_steps: Tensor

    def __init__(
        self, generator: Generator, discriminator: Discriminator, config: TrainConfig, dtype: torch.dtype | None = None
    ) -> None:
        """`dtype` is the compute type of both nets (None: that of their weights). Updates the nets in place."""
        super().__init__()
        self.config = config
        self.generator, self.discriminator = generator, discriminator
        self.average = copy.deepcopy(generator).requires_grad_(False)
        self.equilibrium = Equilibrium(config.gamma, config.lambda_k)
        self.dtype = dtype
        self.device = next(generator.parameters()).device
        self.register_buffer("found_bad", torch.zeros(()))  # 1.0 from the first step that was not finite
        self.register_buffer("bad_step", torch.full((), -1, dtype=torch.int64))
        self.register_buffer("loss_scale", torch.full((), _FIRST_LOSS_SCALE if dtype == torch.float16 else 1.0))
        self.register_buffer("good_steps", torch.zeros(()))
        self.to(self.device)
        self.optimizer_d = self._adam(discriminator)
        self.optimizer_g = self._adam(generator)

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        # lr is a tensor, so that changing it needs no new graph; fused, so that found_inf can hold a step back
        lr = torch.tensor(self.config.lr, device=self.device)
        return torch.optim.Adam(net.parameters(), lr=lr, fused=True)

    def forward(self, real: Tensor, z_d: Tensor, z_g: Tensor, step: int) -> None:
        """One step on real [N, 3, H, W], z_d and z_g [N, latent]. `step` counts from 1, over resumed runs too."""
        self.set_carry(max(0.0, 1 - (step - 1) / self.config.carry_steps))
        self.optimizer_d.zero_grad(set_to_none=True)
        self.optimizer_g.zero_grad(set_to_none=True)
        if self.config.updates == "alternating":
            loss_real = self.discriminator_gradients(real, z_d)
            self._update(self.optimizer_d, loss_real, step)
            loss_fake = self.generator_gradients(z_g)
        elif self.config.latents == "independent":
            loss_fake = self.generator_gradients(z_g)
            loss_real = self.discriminator_gradients(real, z_d)
            self._update(self.optimizer_d, loss_real, step)
        else:
            loss_real, loss_fake = self.shared_gradients(real, z_d)
            self._update(self.optimizer_d, loss_real, step)
        skip = self._update(self.optimizer_g, loss_fake, step)
        self.equilibrium.update(loss_real, loss_fake, skip)
        self._move_average(step * real.shape[0], real.shape[0], skip)
        self._rescale(skip)

    def shared_gradients(self, real: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of L_D on D and of L_G on G from one pass of D an image; returns (L(x), L(G(z)))."""
        fake = self._run(self.generator, z)
        loss_fake = self._loss(fake)
        self._backward(loss_fake)
        gradients = [p.grad for p in self.discriminator.parameters() if p.grad is not None]
        torch._foreach_mul_(gradients, self.equilibrium.k.neg().to(gradients[0].dtype))
        loss_real = self._loss(real)
        self._backward(loss_real)
        return loss_real.detach(), loss_fake.detach()

    def discriminator_gradients(self, real: Tensor, z: Tensor) -> Tensor:
        """Gradient of L_D = L(x) - k L(G(z)) on D; returns L(x)."""
        with torch.no_grad():
            fake = self._run(self.generator, z)
        loss_real = self._loss(real)
        self._backward(loss_real - self.equilibrium.k * self._loss(fake))
        return loss_real.detach()

    def generator_gradients(self, z: Tensor) -> Tensor:
        """Gradient of L_G = L(G(z)) on G; returns L(G(z))."""
        with frozen(self.discriminator):
            loss = self._loss(self._run(self.generator, z))
            self._backward(loss)
        return loss.detach()

    def _run(self, net: nn.Module, x: Tensor) -> Tensor:
        with torch.autocast(self.device.type, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            return net(x)

    def _loss(self, images: Tensor) -> Tensor:
        prediction = self._run(self.discriminator, images)
        return l1_reconstruction_loss(prediction, images, eta=self.config.eta).mean()

    def _backward(self, loss: Tensor) -> None:
        (loss * self.loss_scale.to(loss.dtype) if self.dtype == torch.float16 else loss).backward()

    def _update(self, optimizer: torch.optim.Adam, loss: Tensor, step: int) -> Tensor:
        """Apply the gradients unless they, or anything before, were not finite; returns whether they were held back."""
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        if self.dtype == torch.float16:
            torch._foreach_mul_(gradients, self.loss_scale.reciprocal())
        finite = torch.isfinite(loss) & torch.isfinite(self.equilibrium.k)
        norm_is_finite = torch.isfinite(nn.utils.get_total_norm(gradients))
        # fp16 gradients overflow now and then, which the loss scale answers; anything else ends the run
        bad = ~finite if self.dtype == torch.float16 else ~(finite & norm_is_finite)
        self.bad_step.copy_(torch.where(bad & (self.found_bad == 0), step, self.bad_step))
        self.found_bad.copy_(torch.maximum(self.found_bad, bad.to(self.found_bad.dtype)))
        skip = (self.found_bad > 0) | ~norm_is_finite
        # the contract of torch.amp with a fused optimizer: a step with found_inf = 1 leaves weights and moments alone
        optimizer.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
        optimizer.step()
        return skip

    @torch.no_grad()
    def _move_average(self, images: int, batch: int, skip: Tensor) -> None:
        # a ramp, since an average over 20,000 images of a run that has seen 100 is that of the first weights
        half_life = min(self.config.ema_half_life, 0.05 * images)
        weight = 1 - 0.5 ** (batch / half_life) if half_life > 0 else 1.0
        averages, weights = list(self.average.parameters()), list(self.generator.parameters())
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, torch.where(skip, 0.0, weight).to(change[0].dtype))
        torch._foreach_add_(averages, change)

    def _rescale(self, skip: Tensor) -> None:
        if self.dtype != torch.float16:
            return
        self.good_steps.copy_(torch.where(skip, 0.0, self.good_steps + 1))
        grow = self.good_steps >= _GROW_AFTER
        self.loss_scale.mul_(torch.where(skip, 0.5, torch.where(grow, 2.0, 1.0)))
        self.good_steps.masked_fill_(grow, 0.0)

    def set_carry(self, carry: float) -> None:
        """Weight of the input in vanishing residuals, for both nets and the average; nothing without them."""
        for module in self.modules():
            if isinstance(buffer := getattr(module, "carry", None), Tensor):
                buffer.fill_(carry)

    def set_lr(self, lr: float) -> None:
        """Learning rate of both optimizers."""
        for optimizer in (self.optimizer_d, self.optimizer_g):
            for group in optimizer.param_groups:
                group["lr"].fill_(lr)

    def training_state(self) -> dict[str, Any]:
        """All that the next step depends on, as tensors and plain values."""
        return {
            "modules": self.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """The inverse of `training_state`."""
        self.load_state_dict(state["modules"])
        self.optimizer_d.load_state_dict(state["optimizer_d"])
        self.optimizer_g.load_state_dict(state["optimizer_g"])
