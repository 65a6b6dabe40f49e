"""One training step: both losses, their gradients, both updates, k, and the averaged generator.

Nothing in here waits for the device, and all that changes from step to step is on it, so that a whole step can be one
CUDA graph. A step whose numbers are not finite changes nothing (with alternating updates D may be updated before G's
turn out bad): a flag on the device holds back both optimizers, the average and k from then on, until the host reads it.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .config import TrainConfig
from .equilibrium import Equilibrium
from .models import Discriminator, Generator
from .objective import OBJECTIVES, Objective
from .reading import Reading

# fp16 only: scale of the losses so that small gradients do not vanish, as torch.amp.GradScaler starts it
FIRST_LOSS_SCALE, _GROW_AFTER = 2.0**16, 2000


class TrainStep(nn.Module):
    """State and work of one step. Call it with a batch in [-1, 1] and one draw of z for each player.

    `number` [] int64 counts the steps, over resumed runs too: during a step it is that step's, from 1.
    """

    number: Tensor
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
        compile_mode: str | None = None,
    ) -> None:
        """`dtype` is the compute type of both nets (None: that of their weights). Updates the nets in place.

        `compile_mode` is torch.compile's for the passes through the nets, None for none.
        """
        super().__init__()
        self.config = config
        self.generator, self.discriminator = generator, discriminator
        self.average = copy.deepcopy(generator).requires_grad_(False)
        self.dtype = dtype
        self.device = device = next(generator.parameters()).device
        self.equilibrium = Equilibrium(config.gamma, config.lambda_k).to(device)
        self.register_buffer("number", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("found_bad", torch.zeros((), device=device))  # 1.0 from the first step that was not finite
        self.register_buffer("bad_step", torch.full((), -1, dtype=torch.int64, device=device))
        scale = FIRST_LOSS_SCALE if dtype == torch.float16 else 1.0
        self.register_buffer("loss_scale", torch.full((), scale, device=device))
        self.register_buffer("good_steps", torch.zeros((), device=device))
        discriminator.encoder.recompute = config.recompute
        self.objective = self._objective(compile_mode)
        self.optimizer_d = self._adam(discriminator)
        self.optimizer_g = self._adam(generator)

    def _objective(self, compile_mode: str | None) -> Objective:
        loss_scale = self.loss_scale if self.dtype == torch.float16 else None
        return OBJECTIVES[self.config.passes](
            self.generator,
            self.discriminator,
            eta=self.config.eta,
            dtype=self.dtype,
            loss_scale=loss_scale,
            compile_mode=compile_mode,
        )

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        # lr is a tensor, so that changing it needs no new graph; fused, so that found_inf can hold a step back
        lr = torch.tensor(self.config.lr, device=self.device)
        return torch.optim.Adam(net.parameters(), lr=lr, fused=True, capturable=self.device.type == "cuda")

    def describe(self) -> str:
        """How a step gets its gradients, in a few words."""
        passes = {"textbook": "textbook, D three times", "single-pass": "D once an image", "joint": "D once a batch"}
        words = f"{self.config.passes}: {passes[self.config.passes]}"
        if self.config.passes == "textbook":
            return words
        if self.config.updates == "alternating":
            return f"{words}, then once more for G (alternating updates)"
        return f"{words}, then once more for G (independent z)" if self.config.latents == "independent" else words

    def forward(self, real: Tensor, z_d: Tensor, z_g: Tensor) -> None:
        """One step on real [N, 3, H, W], z_d and z_g [N, latent]."""
        self.number += 1
        self._fade()
        k = self.equilibrium.k
        if self.config.updates == "alternating":
            (loss_real,) = self._gradients(lambda how: (how.for_discriminator(real, z_d, k),))
            held_back = self._update(loss_real, self.optimizer_d)
            (loss_fake,) = self._gradients(lambda how: (how.for_generator(z_g),))
            skip = self._update(loss_fake, self.optimizer_g) | held_back
        else:
            if self.config.latents == "independent":
                loss_real, loss_fake = self._gradients(lambda how: how.independent(real, z_d, z_g, k))
            else:
                loss_real, loss_fake = self._gradients(lambda how: how.shared(real, z_d, k))
            skip = self._update(loss_real + loss_fake, self.optimizer_d, self.optimizer_g)
        self.equilibrium.update(loss_real, loss_fake, skip)
        self._move_average(real.shape[0], skip)
        self._rescale(skip)

    def _gradients(self, compute: Callable[[Objective], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Losses, with gradients on the nets; without torch.compile from then on if that fails."""
        for optimizer in (self.optimizer_d, self.optimizer_g):
            optimizer.zero_grad(set_to_none=True)
        try:
            return compute(self.objective)
        except Exception as error:  # Dynamo, Inductor and the C++ compiler raise many types
            if not self.objective.compiled or isinstance(error, torch.OutOfMemoryError):
                raise
            reason = str(error).strip().partition("\n")[0]
            warnings.warn(f"torch.compile failed, going on without it: {reason}", stacklevel=3)
            self.objective = self._objective(None)
            return self._gradients(compute)

    def _update(self, loss: Tensor, *optimizers: torch.optim.Adam) -> Tensor:
        """Apply the gradients unless one of them, or anything before, was not finite; returns whether held back."""
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        gradients = [p.grad for group in groups for p in group["params"] if p.grad is not None]
        if self.dtype == torch.float16:
            torch._foreach_mul_(gradients, self.loss_scale.reciprocal())
        finite = torch.isfinite(loss) & torch.isfinite(self.equilibrium.k)
        norm_is_finite = torch.isfinite(nn.utils.get_total_norm(gradients))
        # fp16 gradients overflow now and then, which the loss scale answers; anything else ends the run
        bad = ~finite if self.dtype == torch.float16 else ~(finite & norm_is_finite)
        self._mark(bad)
        skip = (self.found_bad > 0) | ~norm_is_finite
        for optimizer in optimizers:
            # the contract of torch.amp with fused optimizers: found_inf = 1 leaves weights and moments alone
            optimizer.found_inf = skip.float()  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
        return skip

    def _mark(self, bad: Tensor) -> None:
        self.bad_step.copy_(torch.where(bad & (self.found_bad == 0), self.number, self.bad_step))
        self.found_bad.copy_(torch.maximum(self.found_bad, bad.to(self.found_bad.dtype)))

    @torch.no_grad()
    def _move_average(self, batch: int, skip: Tensor) -> None:
        # a ramp, since an average over 20,000 images of a run that has seen 100 is that of the first weights
        half_life = (0.05 * batch * self.number.double()).clamp(max=self.config.ema_half_life)
        weight = 1 - torch.exp2(-batch / half_life)  # 1 for a half-life of 0
        averages: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = list(self.generator.parameters())
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, weight.masked_fill(skip, 0.0).to(change[0].dtype))
        torch._foreach_add_(averages, change)

    def _rescale(self, skip: Tensor) -> None:
        if self.dtype != torch.float16:
            return
        self.good_steps.copy_(torch.where(skip, 0.0, self.good_steps + 1))
        grow = self.good_steps >= _GROW_AFTER
        self.loss_scale.mul_(torch.where(skip, 0.5, torch.where(grow, 2.0, 1.0)))
        self.good_steps.masked_fill_(grow, 0.0)
        self._mark(self.loss_scale < 1)  # what overflows at every scale is not finite

    def _fade(self) -> None:
        """Set the input's share in vanishing residuals, for both nets and the average; nothing without them."""
        carry = (1 - (self.number - 1) / self.config.carry_steps).clamp(min=0)
        for module in self.modules():
            if isinstance(buffer := getattr(module, "carry", None), Tensor):
                buffer.copy_(carry)

    def begin_reading(self) -> Reading:
        """For `Equilibrium.means`, and then `found_bad`: what a log row needs, without waiting for it."""
        return Reading(torch.cat((self.equilibrium.take(), self.found_bad[None])))

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
        for optimizer in (self.optimizer_d, self.optimizer_g):
            for group in optimizer.param_groups:
                group["capturable"] = self.device.type == "cuda"  # the state may come from another device
