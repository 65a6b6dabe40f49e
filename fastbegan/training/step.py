"""One training step: both losses, their gradients, both updates, k, and the averaged generator.

Nothing here waits for the device, and everything that changes from step to step lies on it: a whole step can be one
CUDA graph. A step with a number that is not finite changes nothing. A flag on the device then holds back both
optimizers, the average and k, until the host reads it. With alternating updates, D may be updated before G's numbers
turn out bad.
"""

from __future__ import annotations

import copy
import functools
import warnings
from collections.abc import Iterator, Sequence
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
from .objective import Objective, objective_for
from .profiling import named
from .reading import Reading

# fp16 only: scale of the losses so that small gradients do not vanish, as torch.amp.GradScaler starts it
FIRST_LOSS_SCALE, _GROW_AFTER = 2.0**16, 2000
_LARGEST = 1.01  # of an image's values: 1, and what half precision and resizing add


class TrainStep(nn.Module):
    """State and work of one training step of BEGAN (paper §3.2-3.4).

    Call it with a batch and one draw of z for each player. It updates D and G, moves k by lambda_k (gamma L(x) -
    L(G(z))), clamped to [0, 1], and the averaged generator. Nothing is read back from the device.

    After the first step with a loss, gradient or k that is not finite, every call changes nothing: read `found_bad`.
    Changing the learning rate is the caller's (`set_lr`). `equilibrium.read()` gives the means since the last reading.

    Several ranks each call it with their part of the batch and do the same step: gradients and losses are means over
    all parts.

    Attributes:
        generator: G.
        discriminator: D.
        average: The averaged generator, for sampling.
        equilibrium: k, M and running means of the losses (`fastbegan.layers.Equilibrium`).
        optimizer_d: Adam of D.
        optimizer_g: Adam of G.
        number: Steps so far, [] int64, over resumed runs too; during a step its own number, from 1.
        found_bad: 1.0 from the first step on whose loss, gradient or k was not finite, [] float32.
        bad_step: The number of that step, -1 before, [] int64.
        loss_scale: Factor of the losses under fp16, [] float32; else 1.
        good_steps: Steps since `loss_scale` changed, [] float32.
        wish: 1.0 where this rank wants all ranks to stop, [] float32; set by the caller.
        wished: 1.0 or more where a rank wanted it in the step before, [] float32.
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
        """Take both nets as they are; no step is done.

        Args:
            generator: G, on its device; updated in place.
            discriminator: D, on the same device; updated in place.
            config: How to train. The batch of a rank is taken in `config.accumulate` parts.
            dtype: Compute type of both nets, None for that of their weights. Weights and moments keep theirs.
            compile_mode: torch.compile's mode for the passes through the nets, None for none.
            ranks: The processes that train together. Default: this one alone.
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
        return objective_for(self.config.passes)(
            self.generator,
            self.discriminator,
            self.equilibrium.k,
            self.config,
            dtype=self.dtype,
            loss_scale=self.loss_scale if self.dtype == torch.float16 else None,
            compile_mode=compile_mode,
            ready=functools.partial(_collect, self._buckets),  # no method, which would refer back to this step
        )

    def _adam(self, net: nn.Module) -> torch.optim.Adam:
        # lr is a tensor, so that changing it needs no new graph; fused, so that found_inf can hold a step back
        lr = torch.tensor(self.config.lr * self.config.scale, device=self.device)
        return torch.optim.Adam(
            net.parameters(), lr=lr, betas=(self.config.beta1, 0.999), fused=True, capturable=self.device.type == "cuda"
        )

    def describe(self) -> str:
        """How a step gets its gradients.

        Returns:
            A few words, for the first lines of a run.
        """
        words = f"{self.config.passes}: {self.objective.words}"
        if self.config.passes == "textbook":
            return words
        if self.config.updates == "alternating":
            return f"{words}, then once more for G (alternating updates)"
        return f"{words}, then once more for G (independent z)" if self.config.latents == "independent" else words

    def forward(self, real: Tensor, z_d: Tensor, z_g: Tensor) -> None:
        """One step.

        Args:
            real: Images [N, 3, size, size], floating-point, in [-1, 1]; N a multiple of `config.accumulate`.
            z_d: Latents of D's generated images, [N, latent], floating-point, uniform in [-1, 1] in the paper (§3.3).
            z_g: Latents of G's, of the same shape; the same tensor where the config's latents are shared.

        Raises:
            UserError: For other shapes and types, and in the first step for images outside of [-1, 1].
        """
        self._check(real, z_d, z_g)
        self.number += 1
        self._fade()
        for bucket in self._buckets.values():
            bucket.reset()  # a step that cannot be captured ends half-way
        if self.config.updates == "alternating":
            (loss_real,) = self._mean_losses("for_discriminator", real, z_d)
            held_back = self._update(loss_real, self.discriminator)
            (loss_fake,) = self._mean_losses("for_generator", z_g)  # through the D just updated
            held_back = held_back | self._update(loss_fake, self.generator)
        else:
            loss_real, loss_fake = self._mean_losses("for_both", real, z_d, z_g)
            held_back = self._update(loss_real + loss_fake, self.discriminator, self.generator)
        self.equilibrium.update(loss_real, loss_fake, held_back)
        self._move_average(real.shape[0] * self.ranks.world, held_back)
        self._rescale(held_back)

    def _check(self, real: Tensor, z_d: Tensor, z_g: Tensor) -> None:
        model, accepted = self.generator.config, f"[N, 3, {self.generator.config.size}, {self.generator.config.size}]"
        count = len(real) if real.dim() else 0
        if not real.is_floating_point() or real.shape != (count, 3, model.size, model.size) or not count:
            images = f"{str(real.dtype).removeprefix('torch.')} {list(real.shape)}"
            raise UserError(f"real is {images}; accepted: floating-point images {accepted} in [-1, 1]")
        if count % self.config.accumulate:
            raise UserError(f"real has {count} images; accepted: multiples of accumulate, {self.config.accumulate}")
        for name, z in (("z_d", z_d), ("z_g", z_g)):
            if not z.is_floating_point() or z.shape != (count, model.latent):
                latents = f"{str(z.dtype).removeprefix('torch.')} {list(z.shape)}"
                raise UserError(f"{name} is {latents}; accepted: floating-point latents [{count}, {model.latent}]")
        if self._unseen and not (real.is_cuda and torch.cuda.is_current_stream_capturing()):
            low, high = (float(value) for value in real.detach().aminmax())
            if low < -_LARGEST or high > _LARGEST:
                raise UserError(f"real has values from {low:g} to {high:g}; accepted: -1 to 1")
            self._unseen = False  # later steps do not wait for the device

    def _mean_losses(self, players: str, *batch: Tensor) -> tuple[Tensor, ...]:
        """Losses of the objective's method `players`, and gradients on the nets or in their buckets.

        Both are means over the parts of the batch and over ranks.
        """
        losses = self._losses(players, batch)
        if self.ranks.alone:
            return losses
        sums = torch.stack((*losses, self.wish.to(losses[0].dtype)))
        self.ranks.begin_sum(sums).land()
        self.wished.copy_(sums[-1])
        return sums[:-1].div(self.ranks.world).unbind()

    def _losses(self, players: str, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """This rank's losses; where that fails, once more without what may be to blame, if that can be told."""
        try:
            return self._losses_of_parts(players, batch)
        except Exception as error:  # Dynamo, Inductor and the C++ compiler raise many types
            if not self._give_up_something(error):
                raise
        return self._losses(players, batch)  # out here: the tensors in the error's frames are free

    @named("gradients")
    def _losses_of_parts(self, players: str, batch: Sequence[Tensor]) -> tuple[Tensor, ...]:
        for optimizer in (self.optimizer_d, self.optimizer_g):
            optimizer.zero_grad(set_to_none=True)
        for bucket in self._buckets.values():
            bucket.begin()
        self.objective.k = self.equilibrium.k  # `to` and load_state_dict(assign=True) replace buffers
        compute = getattr(self.objective, players)
        parts = self.config.accumulate
        losses = [compute(*part) for part in zip(*(value.chunk(parts) for value in batch), strict=True)]
        return losses[0] if parts == 1 else tuple(torch.stack(values).mean() for values in zip(*losses, strict=True))

    def _give_up_something(self, error: Exception) -> bool:
        """Give up cuDNN's search or torch.compile for good, where it may have led to `error`; whether one was."""
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

    @named("update")
    def _update(self, loss: Tensor, *nets: nn.Module) -> Tensor:
        """Apply the gradients, unless one of them or anything before was not finite; returns whether held back, [].

        Under fp16 gradients overflow now and then, and the loss scale answers that. Anything else ends the run.
        """
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
        bad = ~finite if self.dtype == torch.float16 else ~(finite & norm_is_finite)
        self._mark(bad)
        held_back = (self.found_bad > 0) | ~norm_is_finite
        for optimizer in optimizers:
            # the contract of torch.amp with fused optimizers: found_inf = 1 leaves weights and moments alone
            optimizer.found_inf = held_back.float()  # pyright: ignore[reportAttributeAccessIssue]
            optimizer.step()
        return held_back

    def _mark(self, bad: Tensor) -> None:
        self.bad_step.copy_(torch.where(bad & (self.found_bad == 0), self.number, self.bad_step))
        self.found_bad.copy_(torch.maximum(self.found_bad, bad.to(self.found_bad.dtype)))

    @named("average")
    @torch.no_grad()
    def _move_average(self, batch: int, held_back: Tensor) -> None:
        # a ramp: after 100 images, an average over 20,000 would still be the first weights
        half_life = (0.05 * batch * self.number.double()).clamp(max=self.config.ema_half_life)
        weight = 1 - torch.exp2(-batch / half_life)  # 1 for a half-life of 0
        averages: list[Tensor] = list(self.average.parameters())
        weights: list[Tensor] = list(self.generator.parameters())
        change = torch._foreach_sub(weights, averages)
        torch._foreach_mul_(change, weight.masked_fill(held_back, 0.0).to(change[0].dtype))
        torch._foreach_add_(averages, change)

    def _rescale(self, held_back: Tensor) -> None:
        """Under fp16, halve the loss scale after an overflow and double it after 2,000 good steps."""
        if self.dtype != torch.float16:
            return
        self.good_steps.copy_(torch.where(held_back, 0.0, self.good_steps + 1))
        grow = self.good_steps >= _GROW_AFTER
        self.loss_scale.mul_(torch.where(held_back, 0.5, torch.where(grow, 2.0, 1.0)))
        self.good_steps.masked_fill_(grow, 0.0)
        self._mark(self.loss_scale < 1)  # an overflow at every scale

    def _fade(self) -> None:
        """Set the input's share in vanishing residuals, for both nets and the average; nothing without them."""
        carry = (1 - (self.number - 1) / self.config.carry_steps).clamp(min=0)
        for module in self.modules():
            if isinstance(buffer := getattr(module, "carry", None), Tensor):
                buffer.copy_(carry)

    def begin_reading(self) -> Reading:
        """Send the numbers of a log row on their way to the host, without waiting for them.

        Returns:
            The numbers that `Equilibrium.means` takes, and then `found_bad`.
        """
        return Reading(torch.cat((self.equilibrium.take(), self.found_bad[None])))

    def set_lr(self, lr: float) -> None:
        """Set the learning rate of both optimizers.

        Args:
            lr: The rate, with the config's scaling already in it.
        """
        for optimizer in (self.optimizer_d, self.optimizer_g):
            for group in optimizer.param_groups:
                group["lr"].fill_(lr)

    def training_state(self) -> dict[str, Any]:
        """Everything that the next step depends on.

        Returns:
            Tensors and plain values, the inverse of `load_training_state`.
        """
        return {
            "modules": self.state_dict(),
            "optimizer_d": self.optimizer_d.state_dict(),
            "optimizer_g": self.optimizer_g.state_dict(),
        }

    def load_training_state(self, state: dict[str, Any]) -> None:
        """Continue from a state.

        Args:
            state: From `training_state`, of any device.
        """
        self.load_state_dict(state["modules"])
        self.optimizer_d.load_state_dict(state["optimizer_d"])
        self.optimizer_g.load_state_dict(state["optimizer_g"])
        for optimizer in (self.optimizer_d, self.optimizer_g):
            for group in optimizer.param_groups:
                group["capturable"] = self.device.type == "cuda"  # the state may come from another device

    def fingerprint(self) -> int:
        """A checksum of everything that the next step depends on.

        Returns:
            A number that is the same on every rank while their weights are.
        """
        total = torch.zeros((), dtype=torch.int64, device=self.device)
        for tensor in _tensors(self.training_state()):
            words = torch.int32 if tensor.element_size() % 4 == 0 else torch.uint8
            values = tensor.detach().to(self.device).reshape(-1).view(words).long()
            odd = torch.arange(1, 2 * len(values), 2, device=self.device)  # so that order counts
            total = total * 31 + (values * odd).sum()
        return int(total.item())

    def adopt_kernels(self) -> None:
        """Take the kernels that the first rank has chosen so far, on all ranks.

        The kernel that updates k is always among them: each rank runs it, and a difference would part the ranks.
        """
        if self.ranks.alone:
            return
        if self.ranks.first:
            zero = torch.zeros((), device=self.device)
            Equilibrium().to(self.device).update(zero, zero)
        tuning.adopt(self.device, self.ranks.from_first(tuning.choices(self.device)))


def _collect(buckets: dict[nn.Module, Bucket], net: nn.Module) -> None:
    if net in buckets:
        buckets[net].collect()


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _tensors(item)
