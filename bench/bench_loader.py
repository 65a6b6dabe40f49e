"""Batches of a packed set, as training takes them, against torch's DataLoader over the same images."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from bench.counts import launches
from bench.gpu_cases import DEVICE
from fastbegan.bench.results import Row
from fastbegan.data.loader import make_loader

COUNT, SIDE, BATCH = 4096, 64, 64
TURN = 16  # batches


class _Images(Dataset):
    """uint8 [count, side, side, 3] as floats in [-1, 1], mirrored at random: what a short script would write."""

    def __init__(self, images: np.ndarray) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = torch.from_numpy(self.images[index]).permute(2, 0, 1).float() / 127.5 - 1
        return image.flip(2) if torch.rand(()) < 0.5 else image


def bench_loader(race: Callable[..., Row], needs: Callable[[float], None]) -> None:
    needs(4.0 * COUNT * SIDE * SIDE * 3)
    images = np.random.default_rng(0).integers(0, 256, (COUNT, SIDE, SIDE, 3), dtype=np.uint8)
    loader, _ = make_loader(images, batch_size=BATCH, seed=0, flip=True, device=DEVICE)
    position = torch.zeros((), dtype=torch.int64, device=DEVICE)
    done = 0

    def own() -> torch.Tensor:
        nonlocal done
        loader.prepare(done)
        batch = loader.current(position.fill_(done))
        done += BATCH
        return batch

    def endless() -> Iterator[torch.Tensor]:
        while True:
            yield from DataLoader(_Images(images), BATCH, shuffle=True, drop_last=True)

    others = endless()
    batch = own()
    assert batch.shape == next(others).shape == (BATCH, 3, SIDE, SIDE) and batch.abs().max() <= 1
    row = Row("loader", f"packed, {SIDE} px, batch {BATCH}", images=BATCH, moved=5 * BATCH * SIDE * SIDE * 3)
    row.counts = launches(own, DEVICE)
    turns = {
        "packed": lambda: [own() for _ in range(TURN)],
        "DataLoader": lambda: [next(others).to(DEVICE) for _ in range(TURN)],
    }
    race(row, turns, calls=dict.fromkeys(turns, TURN))
