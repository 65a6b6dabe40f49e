"""Batches from pictures on disk: packing them, and every loader, against ImageFolder and torch's DataLoader."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image

from bench.cases import DEVICE
from fastbegan.config import TrainConfig
from fastbegan.data import dali_loader
from fastbegan.data.choose import open_loader
from fastbegan.data.decode import Decoding
from fastbegan.data.faces import faces
from fastbegan.data.loader import Loader
from fastbegan.data.prepare import make_pack
from fastbegan.measure.results import Row

WIDTH, HEIGHT = 178, 218  # of CelebA's aligned images
BATCH, COUNT, KINDS = 64, 4096, 256  # files, and different pictures among them
BYTES = 5 * BATCH * 3  # read as uint8 and written as float32, a pixel of each image


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEG files, as ImageFolder wants it: in a folder of their class."""
    folder = tmp_path_factory.mktemp("files") / "all"
    folder.mkdir()
    generator = np.random.default_rng(0)
    drawn = faces(torch.arange(KINDS), HEIGHT).numpy()[:, :, (HEIGHT - WIDTH) // 2 :][:, :, :WIDTH]
    for number, picture in enumerate(drawn):
        noisy = picture + generator.normal(0, 4, picture.shape)  # as cameras do, so that files are as large as theirs
        first = folder / f"{number:06d}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(first, quality=90)
        for other in range(number + KINDS, COUNT, KINDS):
            (folder / f"{other:06d}.jpg").write_bytes(first.read_bytes())
    return folder


class _Stretch(torch.utils.data.Sampler[int]):
    """Random images for one turn, so that workers read nothing beyond it."""

    def __init__(self, batches: int) -> None:
        self.images = batches * BATCH

    def __len__(self) -> int:
        return self.images

    def __iter__(self) -> Iterator[int]:
        return iter(torch.randint(COUNT, (self.images,)).tolist())


class Setting(NamedTuple):
    """Pictures of a size, and who else reads them."""

    side: int
    files: Path
    batches: int
    """In a turn: many, since loaders have some ready when it begins, and read some ahead when it is over."""
    others: dict[str, Callable[[], torch.Tensor]]
    """Turns of a short script: in the process itself, as DataLoader does by default, and in worker processes."""


@pytest.fixture(params=[64, 128])
def setting(request: pytest.FixtureRequest, files: Path, quick: bool, sizes: list[int]) -> Setting:
    side, batches = request.param, 8 if quick else 32
    if (quick and side != 64) or (sizes and side not in sizes):
        pytest.skip("not in --quick" if quick else "not in --sizes")
    datasets = pytest.importorskip("torchvision.datasets")
    from torchvision import transforms

    steps = [transforms.CenterCrop(WIDTH), transforms.Resize(side, antialias=True), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    folder = datasets.ImageFolder(str(files.parent), transforms.Compose(steps))
    cores = len(os.sched_getaffinity(0))

    def turn(workers: int) -> Callable[[], torch.Tensor]:
        loader = torch.utils.data.DataLoader(
            folder, BATCH, sampler=_Stretch(batches), num_workers=workers, persistent_workers=workers > 0
        )
        return lambda: [images.to(DEVICE) for images, _ in loader][-1]

    others = {"ImageFolder": turn(0)} | ({} if quick else {f"ImageFolder, {cores} processes": turn(cores)})
    return Setting(side, files, batches, others)


def _turn(loader: Loader, batches: int) -> Callable[[], torch.Tensor]:
    position, done = torch.zeros((), dtype=torch.int64, device=DEVICE), 0

    def work() -> torch.Tensor:
        for _ in range(batches - 1):
            take()
        return take()

    def take() -> torch.Tensor:
        nonlocal done
        loader.prepare(done)
        done += BATCH
        return loader.current(position.fill_(done - BATCH))

    return work


class _NormalizedByDali(dali_loader.DaliLoader):
    """The last steps in DALI instead of in our kernel."""

    def _buffers(self, window: list[torch.Tensor], **options: Any) -> list[torch.Tensor]:
        images, *rest = super()._buffers(window, **options)
        return [torch.empty(images.shape, device=images.device), *rest]

    def finish(self, images: Any, fn: Any, types: Any) -> Any:
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="HWC", mean=[127.5], std=[127.5])

    def current(self, position: torch.Tensor) -> torch.Tensor:
        images, flip = self._staged[:2]
        return torch.where(flip[:, None, None, None], images.flip(2), images).permute(0, 3, 1, 2)


def _plain(loader: Loader, batches: int) -> Callable[[], torch.Tensor]:
    """The same from images in memory, in plain PyTorch."""
    images = loader.pixels(torch.arange(COUNT)).to(DEVICE)

    def take() -> torch.Tensor:
        batch = images[torch.randint(COUNT, (BATCH,), device=DEVICE)]
        flip = torch.rand(BATCH, 1, 1, 1, device=DEVICE) < 0.5
        return torch.where(flip, batch.flip(2), batch).float().div_(127.5).sub_(1).permute(0, 3, 1, 2)

    return lambda: [take() for _ in range(batches)][-1]


@pytest.mark.parametrize("kind", ["packed", "dali", "resident", "torch"])
def bench_loader(
    kind: str,
    setting: Setting,
    race: Callable[..., Row],
    needs: Callable[[float], None],
    quick: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    if quick and kind in ("resident", "torch"):
        pytest.skip("not in --quick")
    if kind == "dali" and not dali_loader.INSTALLED:
        pytest.skip("NVIDIA DALI is not installed: pip install 'fastbegan[dali]'")
    side, files, batches, others = setting
    needs(8.0 * COUNT * side * side * 3)
    monkeypatch.setenv("FASTBEGAN_CACHE", str(tmp_path))
    train = TrainConfig(data=str(files), crop=str(WIDTH), batch_size=BATCH, loader=kind)  # pyright: ignore
    loader, *_ = open_loader(train, side, DEVICE, lambda *_: None)
    plain = {"plain PyTorch": _plain(loader, batches)} if kind in ("packed", "resident") else {}
    turns = {kind: _turn(loader, batches), **plain, **others}
    assert all(turn().shape == (BATCH, 3, side, side) for turn in turns.values())
    if kind == "dali":
        with monkeypatch.context() as patched:
            patched.setattr("fastbegan.data.choose._FROM_FILES", {"dali": _NormalizedByDali})
            normalized = open_loader(train, side, DEVICE, lambda *_: None)[0]
        assert (normalized.batch(0) - loader.batch(0)).abs().max() < 1e-5
        turns["normalised in DALI"] = _turn(normalized, batches)
    row = Row("data", f"{kind} {side} px", images=BATCH, moved=BYTES * side * side)
    race(row, turns, calls=dict.fromkeys(turns, batches), least=5)
    loader.close()


def bench_pack(setting: Setting, race: Callable[..., Row], tmp_path: Path) -> None:
    """From the files to the finished pack, worker processes' start included."""
    side, files, batches, others = setting
    numbers = itertools.count()

    def pack() -> None:
        path = tmp_path / f"{next(numbers)}.pack"
        assert len(make_pack(str(files), path, side, Decoding(str(WIDTH)), lambda *_: None).images) == COUNT
        path.unlink()

    turns = {"pack": pack, **others}
    calls = dict.fromkeys(turns, batches) | {"pack": COUNT // BATCH}
    race(Row("data", f"pack {side} px", images=BATCH), turns, calls=calls, least=5)
