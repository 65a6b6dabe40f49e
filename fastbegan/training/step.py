"""One training step: both losses, their gradients, both updates, k, and the averaged generator.

Nothing in here waits for the device, and all that changes from step to step is on it, so that a whole step can be one
CUDA graph. A step whose numbers are not finite changes nothing (with alternating updates D may be updated before G's
turn out bad): a flag on the device holds back both optimizers, the average and k from then on, until the host reads it.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fastbegan_kernels import tuning
from fastbegan_kernels.faults import is_failed_search, is_out_of_memory

from ..config import TrainConfig
from ..distributed.bucket import Bucket
from ..distributed.ranks import LostContactError, Ranks
from ..errors import UserError
from ..layers import Equilibrium
from ..nets.models import Discriminator, Generator
from .objective import OBJECTIVES, Objective
from .reading import Reading

# fp16 only: scale of the losses so that small gradients do not vanish, as torch.amp.GradScaler starts it
FIRST_LOSS_SCALE, _GROW_AFTER = 2.0**16, 2000
_LARGEST = 1.01  # of an image's values: 1, and what half precision and resizing add


class TrainStep(nn.Module):
    """State and work of one step. Call it with a batch in [-1, 1] and one draw of z for each player.

    `number` [] int64 counts the steps, over resumed runs too: during a step it is that step's, from 1. Of several ranks
    each takes its part of the batch, and all do the same step: gradients and losses are means over all parts. `wish` is
    what this rank wants all to know (0 or 1), `wished` what at least one of them wanted in the step before.
    """

    number: Tensor
    wish: Tensor
    wished: Tensor
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
        ranks: Ranks | None = None,
    ) -> None:
        """`dtype` is the compute type of both nets (None: that of their weights). Updates the nets in place.

        `compile_mode` is torch.compile's for the passes through the nets, None for none. The batch of a rank is taken
        in `config.accumulate` parts.
        """
        super().__init__()
        self._unseen = True  # no image was looked at yet
        self.config, self.ranks = config, ranks or Ranks()
        self.generator, self.discriminator = generator, discriminator
        self.average = copy.deepcopy(generator).requires_grad_(False)
        self.dtype = dtype
        self.device = device = next(generator.parameters()).device
        self.equilibrium = Equilibrium(config.gamma, config.lambda_k * config.scale).to(device)
        self.register_buffer("number", torch.zeros((), dtype=torch.int64, device=device))
        self.register_buffer("found_bad", torch.zeros((), device=device))  # 1.0 from the first step that was not finite
        self.register_buffer("bad_step", torch.full((), -1, dtype=torch.int64, device=device))
        scale = FIRST_LOSS_SCALE if dtype == torch.float16 else 1.0
        self.register_buffer("loss_scale", torch.full((), scale, device=device))
        self.register_buffer("good_steps", torch.zeros((), device=device))
        for name in ("wish", "wished"):
            self.register_buffer(name, torch.zeros((), device=device), persistent=False)
        self._buckets: dict[nn.Module, Bucket] = {}
        if not self.ranks.alone or config.accumulate > 1:
            self._buckets = {net: Bucket(net, self.ranks, config.accumulate) for net in (generator, discriminator)}
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
            ready=functools.partial(_collect, self._buckets),  # no method, which would refer back to this step
        )

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        # lr is a tensor, so that changing it needs no new graph; fused, so that found_inf can hold a step back
        lr = torch.tensor(self.config.lr * self.config.scale, device=self.device)
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
        """One step on real [N, 3, size, size] in [-1, 1], z_d and z_g [N, latent].

        Raises UserError for other shapes and types, and in the first step for images outside of [-1, 1].
        """
        self._check(real, z_d, z_g)
        self.number += 1
        self._fade()
        k = self.equilibrium.k
        for bucket in self._buckets.values():
            bucket.reset()  # of a step that failed half-way, as one does that cannot be captured
        if self.config.updates == "alternating":
            (loss_real,) = self._gradients(lambda how, x, z: (how.for_discriminator(x, z, k),), real, z_d)
            held_back = self._update(loss_real, self.discriminator)
            (loss_fake,) = self._gradients(lambda how, z: (how.for_generator(z),), z_g)
            skip = self._update(loss_fake, self.generator) | held_back
        else:
            if self.config.latents == "independent":
                loss_real, loss_fake = self._gradients(
                    lambda how, x, z, other: how.independent(x, z, other, k), real, z_d, z_g
                )
            else:
                loss_real, loss_fake = self._gradients(lambda how, x, z: how.shared(x, z, k), real, z_d)
            skip = self._update(loss_real + loss_fake, self.discriminator, self.generator)
        self.equilibrium.update(loss_real, loss_fake, skip)
        self._move_average(real.shape[0] * self.ranks.world, skip)
        self._rescale(skip)

    def _check(self, real: Tensor, z_d: Tensor, z_g: Tensor) -> None:
        model, accepted = self.generator.config, f"[N, 3, {self.generator.config.size}, {self.generator.config.size}]"
        count = len(real) if real.dim() else 0
        if not real.is_floating_point() or real.shape != (count, 3, model.size, model.size) or not count:
            found = f"{str(real.dtype).removeprefix('torch.')} {list(real.shape)}"
            raise UserError(f"real is {found}; accepted: floating-point images {accepted} in [-1, 1]")
        if count % self.config.accumulate:
            raise UserError(f"real has {count} images; accepted: multiples of accumulate, {self.config.accumulate}")
        for name, z in (("z_d", z_d), ("z_g", z_g)):
            if not z.is_floating_point() or z.shape != (count, model.latent):
                found = f"{str(z.dtype).removeprefix('torch.')} {list(z.shape)}"
                raise UserError(f"{name} is {found}; accepted: floating-point latents [{count}, {model.latent}]")
        if self._unseen and not (real.is_cuda and torch.cuda.is_current_stream_capturing()):
            low, high = (float(value) for value in real.detach().aminmax())
            if low < -_LARGEST or high > _LARGEST:
                raise UserError(f"real has values from {low:g} to {high:g}; accepted: -1 to 1")
            self._unseen = False  # later steps do not wait for the device

    def _gradients(self, compute: Callable[..., tuple[Tensor, ...]], *batch: Tensor) -> tuple[Tensor, ...]:
        """Losses, with gradients on the nets or in their buckets: means over the parts of the batch and over ranks."""
        losses = self._of_parts(compute, batch)
        if self.ranks.alone:
            return losses
        told = torch.stack((*losses, self.wish.to(losses[0].dtype)))
        self.ranks.begin_sum(told).land()
        self.wished.copy_(told[-1])
        return told[:-1].div(self.ranks.world).unbind()

    def _of_parts(self, compute: Callable[..., tuple[Tensor, ...]], batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """This rank's losses; where it fails, once more without what may be to blame, if that can be told."""
        try:
            return self._compute(compute, batch)
        except Exception as error:  # Dynamo, Inductor and the C++ compiler raise many types
            if not self._give_up_something(error):
                raise
        return self._of_parts(compute, batch)  # out here: what the error's frames hold is free

    def _compute(self, compute: Callable[..., tuple[Tensor, ...]], batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for optimizer in (self.optimizer_d, self.optimizer_g):
            optimizer.zero_grad(set_to_none=True)
        for bucket in self._buckets.values():
            bucket.begin()
        parts = self.config.accumulate
        chunks = zip(*(value.chunk(parts) for value in batch), strict=True)
        losses = [compute(self.objective, *part) for part in chunks]
        return losses[0] if parts == 1 else tuple(torch.stack(one).mean() for one in zip(*losses, strict=True))

    def _give_up_something(self, error: Exception) -> bool:
        """Whether something was given up, for good, that may have led to `error`: cuDNN's search, or torch.compile."""
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return False
        searching = self.device.type == "cuda" and torch.backends.cudnn.benchmark
        if is_out_of_memory(error) or (searching and is_failed_search(error)):
            if not searching or not self.ranks.alone:  # others wait for this rank's first try
                return False
            tuning.give_up_search()
            torch.cuda.empty_cache()
            warnings.warn("cuDNN's search for algorithms does not fit into memory, going on without it", stacklevel=5)
            return True
        if not self.objective.compiled or isinstance(error, LostContactError):
            return False
        reason = str(error).strip().partition("\n")[0]
        warnings.warn(f"torch.compile failed, going on without it: {reason}", stacklevel=5)
        self.objective = self._objective(None)
        return True

    def _update(self, loss: Tensor, *nets: nn.Module) -> Tensor:
        """Apply the gradients unless one of them, or anything before, was not finite; returns whether held back."""
        for net in nets:
            if net in self._buckets:
                self._buckets[net].finish()
        optimizers = [self.optimizer_d if net is self.discriminator else self.optimizer_g for net in nets]
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

    def fingerprint(self) -> int:
        """A checksum of all that the next step depends on: the same on every rank."""
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for tensor in _tensors(self.training_state()):
            words = torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8
            values = tensor.detach().to(self.device).reshape(-1).view(words).long()
            odd = torch.arange(1, 2 * len(values), 2, device=self.device)  # so that order counts
            total = total * 31 + (values * odd).sum()
        return int(total.item())

    def adopt_kernels(self) -> None:
        """All ranks take the kernels that the first one chose so far; k's always, which each computes for itself."""
        if self.ranks.alone:
            return
        if self.ranks.first:
            none = torch.zeros((), device=self.device)
            Equilibrium().to(self.device).update(none, none)
        tuning.adopt(self.device, self.ranks.from_first(tuning.choices(self.device)))

    def load_training_state(self, state: dict[str, Any]) -> None:
        """The inverse of `training_state`."""
        self.load_state_dict(state["modules"])
        self.optimizer_d.load_state_dict(state["optimizer_d"])
        self.optimizer_g.load_state_dict(state["optimizer_g"])
        for optimizer in (self.optimizer_d, self.optimizer_g):
            for group in optimizer.param_groups:
                group["capturable"] = self.device.type == "cuda"  # the state may come from another device


def _collect(buckets: dict[nn.Module, Bucket], net: nn.Module) -> None:
    if net in buckets:
        buckets[net].collect()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for one in value.values() if isinstance(value, dict) else value:
            yield from _tensors(one)
