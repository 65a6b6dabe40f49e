"""What the examples share: the default data, and a race of one training step with and without `accelerate`."""

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

SIZE = 32  # of the images, in pixels


class Experiment(Protocol):
    """Nets, their optimizers, and one training step."""

    nets: dict[str, torch.nn.Module]

    def step(self, images: Tensor, z: Tensor) -> dict[str, Tensor]:
        """Train on images [N, 3, H, W] in [-1, 1] and latents z [N, 64], uniform in [-1, 1]; returns losses."""
        ...


def race(name: str, make: Callable[[], Experiment]) -> float:
    """Train two copies side by side, turn by turn, one of them accelerated; prints and returns the speed-up of a step.

    Both see the same images and z and begin with the same weights, so their losses stay together.
    """
    parser = argparse.ArgumentParser(description=f"{name}: a training step with and without fast layers")
    parser.add_argument("--steps", type=int, default=30, help="of each copy")
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    device, copies = torch.device(asked.device), {}
    for copy in ("plain", "fast"):
        torch.manual_seed(0)
        copies[copy] = make()
        for net in copies[copy].nets.values():
            net.to(device)
    for title, net in copies["fast"].nets.items():
        report = accelerate(net).fastbegan_report
        print(f"{title}: {len(report.replaced)} of {len(report.replaced) + len(report.left)} convolutions")
    generator = torch.Generator().manual_seed(0)
    seconds: dict[str, list[float]] = {copy: [] for copy in copies}
    losses: dict[str, dict[str, Tensor]] = {}
    for number in range(asked.steps):
        ids = torch.arange(number * asked.batch_size, (number + 1) * asked.batch_size)
        images = normalize_images(faces(ids, SIZE).to(device))
        z = (2 * torch.rand(asked.batch_size, 64, generator=generator) - 1).to(device)
        for copy in list(copies) if number % 2 else reversed(copies):
            begin = _clock(device)
            losses[copy] = copies[copy].step(images, z)
            seconds[copy].append(_clock(device) - begin)
    for copy, found in losses.items():
        words = "  ".join(f"{what} {value.item():.4f}" for what, value in found.items())
        print(f"{copy}: {1e3 * statistics.median(seconds[copy]):.1f} ms a step; {words}")
    settled = slice(min(3, asked.steps - 1), None)
    pairs = zip(seconds["plain"][settled], seconds["fast"][settled], strict=True)
    ratio = statistics.median(plain / fast for plain, fast in pairs)
    print(f"{name}: {ratio:.2f}x as fast, {SIZE} px, batch {asked.batch_size}, {device}")
    return ratio


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
