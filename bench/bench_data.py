"""Batches from pictures on disk: packing them, and every loader, against ImageFolder and torch's DataLoader."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bench.gpu_cases import DEVICE
from fastbegan.bench.results import Row
from fastbegan.config import TrainConfig
from fastbegan.data import dali_loader
from fastbegan.data.choose import open_loader
from fastbegan.data.faces import faces
from fastbegan.data.loader import Loader
from fastbegan.data.prepare import make_pack

WIDTH, HEIGHT = 178, 218  # of CelebA's aligned images
BATCH, TURN, KINDS = 64, 8, 256  # TURN batches make a turn; KINDS of pictures, each of them many times
BYTES = 5 * BATCH * 3  # read as uint8 and written as float32, a pixel of each image


@pytest.fixture(scope="session")
def files(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of JPEG files, as ImageFolder wants it: in a folder of their class."""
    count = 1024 if request.config.getoption("--quick") else 4096
    folder = tmp_path_factory.mktemp("files") / "all"
    folder.mkdir()
    generator = np.random.default_rng(0)
    drawn = faces(torch.arange(KINDS), HEIGHT).numpy()[:, :, (HEIGHT - WIDTH) // 2 :][:, :, :WIDTH]
    for number, picture in enumerate(drawn):
        noisy = picture + generator.normal(0, 4, picture.shape)  # as cameras do, so that files are as large as theirs
        first = folder / f"{number:06d}.jpg"
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(first, quality=90)
        for other in range(number + KINDS, count, KINDS):
            (folder / f"{other:06d}.jpg").write_bytes(first.read_bytes())
    return folder


@pytest.fixture
def other(files: Path, side: int) -> Callable[[], torch.Tensor]:
    """A turn of what a short script would write, with a process for each core."""
    datasets = pytest.importorskip("torchvision.datasets")
    from torchvision import transforms

    steps = [transforms.CenterCrop(WIDTH), transforms.Resize(side, antialias=True), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)]
    folder = datasets.ImageFolder(str(files.parent), transforms.Compose(steps))
    workers = len(os.sched_getaffinity(0))
    loader = torch.utils.data.DataLoader(
        folder, BATCH, shuffle=True, drop_last=True, num_workers=workers, persistent_workers=True
    )

    def endless() -> Iterator[torch.Tensor]:
        while True:
            for images, _ in loader:
                yield images

    batches = endless()
    return lambda: [next(batches).to(DEVICE) for _ in range(TURN)][-1]


@pytest.fixture(params=[64, 128])
def side(request: pytest.FixtureRequest, quick: bool, sizes: list[int]) -> int:
    side = request.param
    if (quick and side != 64) or (sizes and side not in sizes):
        pytest.skip("not in --quick" if quick else "not in --sizes")
    return side


def _turn(loader: Loader) -> Callable[[], torch.Tensor]:
    position, done = torch.zeros((), dtype=torch.int64, device=DEVICE), 0

    def work() -> torch.Tensor:
        for _ in range(TURN - 1):
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

    def finish(self, images: Any, fn: Any, types: Any) -> Any:
        return fn.crop_mirror_normalize(images, dtype=types.FLOAT, output_layout="HWC", mean=[127.5], std=[127.5])

    def current(self, position: torch.Tensor) -> torch.Tensor:
        images, flip = self._staged[:2]
        assert images is not None and flip is not None
        return torch.where(flip[:, None, None, None], images.flip(2), images).permute(0, 3, 1, 2)


@pytest.mark.parametrize("kind", ["resident", "packed", "dali", "torch"])
def bench_loader(
    kind: str, side: int, files: Path, other: Callable[[], object], race: Callable[..., Row],
    needs: Callable[[float], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    if kind == "dali" and not dali_loader.INSTALLED:
        pytest.skip("NVIDIA DALI is not installed: pip install 'fastbegan[dali]'")
    needs(8.0 * len(list(files.iterdir())) * side * side * 3)
    monkeypatch.setenv("FASTBEGAN_CACHE", str(tmp_path))
    train = TrainConfig(data=str(files), crop=str(WIDTH), batch_size=BATCH, loader=kind)  # pyright: ignore
    loader, *_ = open_loader(train, side, DEVICE, lambda *_: None)
    turns = {kind: _turn(loader), "ImageFolder": other}
    assert turns[kind]().shape == other().shape == (BATCH, 3, side, side)  # pyright: ignore
    if kind == "dali":
        with monkeypatch.context() as patched:
            patched.setattr("fastbegan.data.choose._FROM_FILES", {"dali": _NormalizedByDali})
            normalized = open_loader(train, side, DEVICE, lambda *_: None)[0]
        _same(normalized, loader)
        turns["normalised in DALI"] = _turn(normalized)
    row = Row("data", f"{kind} {side} px", images=BATCH, moved=BYTES * side * side)
    race(row, turns, calls=dict.fromkeys(turns, TURN))
    loader.close()


def _same(one: Loader, two: Loader) -> None:
    assert (one.batch(0) - two.batch(0)).abs().max() < 1e-5


def bench_pack(side: int, files: Path, other: Callable[[], object], race: Callable[..., Row], tmp_path: Path) -> None:
    """From the files to the finished pack, worker processes' start included."""
    count, number = len(list(files.iterdir())), 0

    def pack() -> None:
        nonlocal number
        number += 1
        found = make_pack(str(files), tmp_path / f"{number}.pack", side, str(WIDTH), lambda *_: None)
        assert len(found.images) == count
        (tmp_path / f"{number}.pack").unlink()

    row = Row("data", f"pack {side} px", images=BATCH)
    race(row, {"pack": pack, "ImageFolder": other}, calls={"pack": count // BATCH, "ImageFolder": TURN}, least=3)
