"""The common part of the examples: the default data, and a race of training steps with and without `accelerate`."""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor

from fastbegan import accelerate
from fastbegan.data.faces import faces
from fastbegan_kernels import normalize_images

SIZE = 32  # height and width of the images


class Experiment(Protocol):
    """A training experiment: nets, their optimizers, and a step."""

    nets: dict[str, torch.nn.Module]

    def step(self, images: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Take a training step and return its losses, by name.

        Images are float32 [N, 3, H, W] in [-1, 1]; latents z are float32 [N, 64], uniform in [-1, 1].
        """
        ...


def race(name: str, make: Callable[[], Experiment]) -> float:
    """Train two copies turn by turn, one of them accelerated; print and return the speed-up of a step.

    Both start with the same weights and see the same images and latents, so their losses stay together.

    Args:
        name: Title of the experiment, for the output.
        make: Builds a copy.
    """
    parser = argparse.ArgumentParser(description=f"{name}: a training step with and without fast layers")
    parser.add_argument("--steps", type=int, default=30, help="of each copy")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    device, copies = torch.device(options.device), {}
    for copy in ("plain", "fast"):
        torch.manual_seed(0)
        copies[copy] = make()
        for net in copies[copy].nets.values():
            net.to(device)
    for net in copies["fast"].nets.values():
        accelerate(net)
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {copy: [] for copy in copies}
    losses: dict[str, dict[str, Tensor]] = {}
    for number in range(options.steps):
        ids = torch.arange(number * options.batch_size, (number + 1) * options.batch_size)
        images = normalize_images(faces(ids, SIZE).to(device))
        z = (2 * torch.rand(options.batch_size, 64, generator=generator) - 1).to(device)
        # the order alternates, so that neither copy profits from the other's warm caches
        for copy in list(copies) if number % 2 else reversed(copies):
            start = _clock(device)
            losses[copy] = copies[copy].step(images, z)
            seconds[copy].append(_clock(device) - start)
    for title, net in copies["fast"].nets.items():
        print(f"{title}: {str(net.fastbegan_report).splitlines()[-1]}")
    for copy, values in losses.items():
        words = "  ".join(f"{title} {value.item():.4f}" for title, value in values.items())
        print(f"{copy}: {1e3 * statistics.median(seconds[copy]):.1f} ms a step; {words}")
    settled = slice(min(3, options.steps - 1), None)  # the first steps compile and choose kernels
    pairs = zip(seconds["plain"][settled], seconds["fast"][settled], strict=True)
    ratio = statistics.median(plain / fast for plain, fast in pairs)
    print(f"{name}: {ratio:.2f}x as fast, {SIZE} px, batch {options.batch_size}, {device}")
    return ratio


def _clock(device: torch.device) -> float:
    """The time, in seconds, at which all work queued on the device has ended."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
