"""FLOPs, parameters and memory of a training step, counted on the meta device, and an estimate of a run's time."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import torch
from torch.autograd.graph import saved_tensors_hooks

from ..config import ModelConfig, TrainConfig
from ..nets.models import Discriminator, Generator, count_parameters
from .objective import objective_for

# FLOP/s of a step: measured with `fastbegan bench step` on two CPU cores, assumed for a GPU
_CPU_RATE, _GPU_RATE = 8e10, 2e13


@dataclass(frozen=True)
class StepCost:
    """Costs of one training step."""

    parameters: int
    """Parameters of G and D."""
    flops: int
    """A multiply-add counts as two; convolutions and matrix products only."""
    generator: int
    """Parameters of G alone."""
    after_generator: int
    """FLOPs that remain when G's gradients are complete: the time in which their sum over ranks is hidden."""
    kept: int
    """Peak bytes of activations that are kept for backward passes, per image of the batch."""
    memory: int
    """Modelled bytes: weights, gradients, Adam's two moments, the average, packed weights, activations."""


def step_cost(model: ModelConfig, train: TrainConfig, dtype: torch.dtype | None = None) -> StepCost:
    """Count one step on the meta device, without arithmetic or memory.

    Args:
        model: Size of the nets.
        train: Batch size and kind of step.
        dtype: Compute type; None means float32.

    Returns:
        The step's costs.
    """
    from torch.utils.flop_counter import FlopCounterMode  # here, because the import takes a tenth of a second

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
        objective = objective_for(train.passes)(
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
    """Counts the bytes of activations that backward passes keep alive, and their peak."""

    def __init__(self) -> None:
        self.now = self.peak = 0
        self._holders: Counter[int] = Counter()
        super().__init__(self._keep, lambda saved: saved.tensor)

    def _keep(self, tensor: torch.Tensor) -> _Held:
        owner = tensor if tensor._base is None else tensor._base
        leaf = owner.is_leaf and owner.requires_grad  # weights and the batch, which `step_cost` adds by itself
        return _Held(self, tensor, 0 if leaf else tensor.untyped_storage().nbytes())

    def hold(self, storage: int, size: int, change: int) -> None:
        """Add (`change` 1) or remove (-1) a holder of a storage of `size` bytes; several holders count once."""
        before = self._holders[storage]
        self._holders[storage] += change
        if not before or not self._holders[storage]:
            self.now += change * size
            self.peak = max(self.peak, self.now)


class _Held:
    """A saved tensor. Autograd's last reference to it ends with `__del__`."""

    def __init__(self, ledger: _Ledger, tensor: torch.Tensor, size: int) -> None:
        self.ledger, self.tensor, self.size = ledger, tensor, size
        self.storage = tensor.untyped_storage()._cdata
        ledger.hold(self.storage, size, 1)

    def __del__(self) -> None:
        self.ledger.hold(self.storage, self.size, -1)


def step_seconds(model: ModelConfig, train: TrainConfig, device: torch.device) -> float:
    """An estimate of a step's length in seconds, from its FLOPs."""
    return step_cost(model, train).flops / (_GPU_RATE if device.type == "cuda" else _CPU_RATE)


def run_seconds(train: TrainConfig, seconds: float) -> float:
    """A run's length in seconds, from that of a step."""
    lengths = [60 * train.minutes] if train.minutes else []
    lengths += [seconds * train.steps] if train.steps else []
    lengths += [seconds * train.images / train.batch_size] if train.images else []
    return min(lengths)
