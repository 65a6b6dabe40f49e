"""One training step: both losses, their gradients, both updates, k, and the averaged generator.

Nothing in here waits for the device. A step whose numbers are not finite changes nothing: a flag on the device holds
back both optimizers, the average and k, from that step on, until the host reads it.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .equilibrium import Equilibrium
from .models import Discriminator, Generator
from .objective import Objective

# fp16 only: scale of the losses so that small gradients do not vanish, as torch.amp.GradScaler starts it
_FIRST_LOSS_SCALE, _GROW_AFTER = 2.0**16, 2000


class TrainStep(nn.Module):
    """State and work of one step. Call it with a batch in [-1, 1] and one draw of z for each player."""

    found_bad: Tensor
    bad_step: Tensor
    loss_scale: Tensor
    good_steps: Tensor

    def __init__(
        self,
        generator: Generator,
        discriminator: Discriminator,
        config: TrainConfig,
        dtype: torch.dtype | None = None,
    ) -> None:
        """`dtype` is the compute type of both nets (None: that of their weights). Updates the nets in place."""
        super().__init__()
        self.config = config
        self.generator, self.discriminator = generator, discriminator
        self.average = copy.deepcopy(generator).requires_grad_(False)
        self.dtype = dtype
        self.device = device = next(generator.parameters()).device
        self.equilibrium = Equilibrium(config.gamma, config.lambda_k).to(device)
        self.register_buffer("found_bad", torch.zeros((), device=device))  # 1.0 from the first step that was not finite
        self.register_buffer("bad_step", torch.full((), -1, dtype=torch.int64, device=device))
        scale = _FIRST_LOSS_SCALE if dtype == torch.float16 else 1.0
        self.register_buffer("loss_scale", torch.full((), scale, device=device))
        self.register_buffer("good_steps", torch.zeros((), device=device))
        loss_scale = self.loss_scale if dtype == torch.float16 else None
        self.objective = Objective(generator, discriminator, eta=config.eta, dtype=dtype, loss_scale=loss_scale)
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
        k = self.equilibrium.k
        if self.config.updates == "alternating":
            loss_real = self.objective.for_discriminator(real, z_d, k)
            held_back = self._update(loss_real, step, self.optimizer_d)
            loss_fake = self.objective.for_generator(z_g)
            skip = self._update(loss_fake, step, self.optimizer_g) | held_back
        else:
            if self.config.latents == "independent":
                loss_fake = self.objective.for_generator(z_g)
                loss_real = self.objective.for_discriminator(real, z_d, k)
            else:
                loss_real, loss_fake = self.objective.shared(real, z_d, k)
            skip = self._update(loss_real + loss_fake, step, self.optimizer_d, self.optimizer_g)
        self.equilibrium.update(loss_real, loss_fake, skip)
        self._move_average(step * real.shape[0], real.shape[0], skip)
        self._rescale(skip, step)

    def _update(self, loss: Tensor, step: int, *optimizers: torch.optim.Adam) -> Tensor:
        """Apply the gradients unless one of them, or anything before, was not finite; returns whether held back."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if self.dtype == torch.float16:
            torch._foreach_mul_(gradients, self.loss_scale.reciprocal())
        finite = torch.isfinite(loss) & torch.isfinite(self.equilibrium.k)
        norm_is_finite = torch.isfinite(nn.utils.get_total_norm(gradients))
        # fp16 gradients overflow now and then, which the loss scale answers; anything else ends the run
        bad = ~finite if self.dtype == torch.float16 else ~(finite & norm_is_finite)
        self._mark(bad, step)
        skip = (self.found_bad > 0) | ~norm_is_finite
        for optimizer in optimizers:
            # the contract of torch.amp with fused optimizers: found_inf = 1 leaves weights and moments alone
            optimizer.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
        return skip

    def _mark(self, bad: Tensor, step: int) -> None:
        self.bad_step.copy_(torch.where(bad & (self.found_bad == 0), step, self.bad_step))
        self.found_bad.copy_(torch.maximum(self.found_bad, bad.to(self.found_bad.dtype)))

    @torch.no_grad()
    def _move_average(self, images: int, batch: int, skip: Tensor) -> None:
        # a ramp, since an average over 20,000 images of a run that has seen 100 is that of the first weights
        half_life = min(self.config.ema_half_life, 0.05 * images)
        weight = 1 - 0.5 ** (batch / half_life) if half_life > 0 else 1.0
        averages: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = list(self.generator.parameters())
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, torch.where(skip, 0.0, weight).to(change[0].dtype))
        torch._foreach_add_(averages, change)

    def _rescale(self, skip: Tensor, step: int) -> None:
        if self.dtype != torch.float16:
            return
        self.good_steps.copy_(torch.where(skip, 0.0, self.good_steps + 1))
        grow = self.good_steps >= _GROW_AFTER
        self.loss_scale.mul_(torch.where(skip, 0.5, torch.where(grow, 2.0, 1.0)))
        self.good_steps.masked_fill_(grow, 0.0)
        self._mark(self.loss_scale < 1, step)  # what overflows at every scale is not finite

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
