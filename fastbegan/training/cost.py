"""What a training step needs, counted on the meta device: FLOPs, parameters, memory; and about how long a run takes."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..config import ModelConfig, TrainConfig
from ..nets.models import Discriminator, Generator, count_parameters
from .objective import OBJECTIVES

# FLOP/s that a step can count on: measured with `fastbegan bench step` on two CPU cores, assumed for a GPU
_CPU_RATE, _GPU_RATE = 8e10, 2e13


@dataclass(frozen=True)
class StepCost:
    """What one training step needs, counted without running it."""

    parameters: int
    flops: int
    generator: int
    """Parameters of G alone."""
    after_generator: int
    """FLOPs that are still to be done when G's gradients are complete, and can travel between ranks."""
    kept: int
    """Bytes of activations that the step keeps for its backward passes at its fullest, an image of the batch."""
    memory: int
    """Bytes in all, modelled: weights, gradients, Adam's two moments, the average, packed weights, activations."""


def step_cost(model: ModelConfig, train: TrainConfig, dtype: torch.dtype | None = None) -> StepCost:
    """Count one step on the meta device: no arithmetic is done and no memory is used.

    `dtype` is the compute type (None: float32). `flops` counts a multiply-add as two, convolutions and matrix products
    only.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here: it takes a tenth of a second to import

    textbook = train.passes == "textbook"
    with torch.device("meta"):
        generator, discriminator = Generator(model), Discriminator(model)
        discriminator.encoder.recompute = train.recompute
        real = torch.empty(train.batch_size, 3, model.size, model.size)
        z = torch.empty(train.batch_size, model.latent)
        if textbook and dtype is not None:  # autocast does not know the meta device
            for net in (generator, discriminator):
                net.to(dtype)
            real, z = real.to(dtype), z.to(dtype)
        ledger, counter = _Ledger(), FlopCounterMode(display=False)
        done: dict[torch.nn.Module, int] = {}  # FLOPs until a net's gradients were complete
        objective = OBJECTIVES[train.passes](
            generator,
            discriminator,
            torch.zeros(()),
            train,
            dtype=None if textbook else dtype,
            ready=lambda net: done.update({net: counter.get_total_flops()}),
        )
        with counter, ledger:
            if train.updates == "simultaneous":
                objective.for_both(real, z, z)
            else:
                objective.for_discriminator(real, z)
                objective.for_generator(z)
    parameters = count_parameters(generator, discriminator)
    # generator: weights, gradients, two moments, average; discriminator: all but the average
    weights = 4 * (5 * count_parameters(generator) + 4 * count_parameters(discriminator))
    packed = 2 * (dtype or torch.float32).itemsize * parameters  # and their gradients
    kept = ledger.peak // train.batch_size
    flops = counter.get_total_flops()
    memory = weights + packed + 3 * real.nbytes + ledger.peak  # the batch, G's images, and a gradient of either
    return StepCost(parameters, flops, count_parameters(generator), flops - done[generator], kept, memory)


class _Ledger(saved_tensors_hooks):
    """Bytes of activations that backward passes keep alive, and the most of them at a time."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()
        super().__init__(self._keep, lambda held: held.tensor)

    def _keep(self, tensor: torch.Tensor) -> _Held:
        owner = tensor if tensor._base is None else tensor._base
        leaf = owner.is_leaf and owner.requires_grad  # weights, packed or not, and the batch: counted apart
        return _Held(self, tensor, 0 if leaf else tensor.untyped_storage().nbytes())

    def hold(self, storage: int, size: int, change: int) -> None:
        """One holder more, or less, of a storage."""
        before = self._holders[storage]
        self._holders[storage] += change
        if not before or not self._holders[storage]:
            self.now += change * size
            self.peak = max(self.peak, self.now)


class _Held:
    """A saved tensor, for as long as autograd keeps it."""

    def __init__(self, ledger: _Ledger, tensor: torch.Tensor, size: int) -> None:
        self.ledger, self.tensor, self.size = ledger, tensor, size
        self.storage = tensor.untyped_storage()._cdata
        ledger.hold(self.storage, size, 1)

    def __del__(self) -> None:
        self.ledger.hold(self.storage, self.size, -1)


def run_seconds(model: ModelConfig, train: TrainConfig, device: torch.device) -> float:
    """About how long a run takes, by its FLOPs."""
    seconds = step_cost(model, train).flops / (_GPU_RATE if device.type == "cuda" else _CPU_RATE)
    lengths = [60 * train.minutes] if train.minutes else []
    lengths += [seconds * train.steps] if train.steps else []
    lengths += [seconds * train.images / train.batch_size] if train.images else []
    return min(lengths)
