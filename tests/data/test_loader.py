"""Loaders: the same images in the same order whatever holds them, and a position is all there is to know."""

from __future__ import annotations

import gc
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from PIL import Image

from fastbegan import TrainConfig, UserError
from fastbegan.data import choose, dali_loader, files_loader
from fastbegan.data.choose import open_loader
from fastbegan.data.decode import Decoding
from fastbegan.data.loader import Batching, Loader, PackedLoader, ResidentLoader
from fastbegan.data.prepare import load_catalogue
from tests.helpers import profiles
from tests.helpers.processes import environment

pytestmark = pytest.mark.core
IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)
CPU = torch.device("cpu")
KINDS = ("resident", "packed", "dali", "torch")


def _loader(
    batch_size: int = 4, seed: int = 0, flip: bool = True, jitter: int = 0, rank: int = 0, world: int = 1
) -> PackedLoader:
    return PackedLoader(IMAGES, Batching(batch_size, 8 - 2 * jitter, seed, flip, jitter, rank, world))


def test_every_image_once_an_epoch() -> None:
    loader = _loader()
    ids = torch.cat([loader.ids(position) for position in range(0, 40, 4)])
    for epoch in range(4):
        assert sorted(ids[10 * epoch : 10 * epoch + 10].tolist()) == list(range(10))
    assert not torch.equal(ids[:10], ids[10:20])


def test_position_is_all_there_is_to_know() -> None:
    first, second = _loader(), _loader()
    for position in (0, 4, 8, 12):
        first.batch(position)
    assert torch.equal(first.batch(16), second.batch(16))
    assert torch.equal(first.batch(8), second.batch(8))  # backwards too
    assert not torch.equal(first.ids(0), _loader(seed=1).ids(0))


def test_batch_size_does_not_change_what_image_number_n_is() -> None:
    small, large = _loader(2), _loader(6)
    assert torch.equal(torch.cat([small.batch(p).clone() for p in (6, 8, 10)]), large.batch(6))


def test_ranks_share_a_step() -> None:
    whole = _loader(6)
    ranks = [_loader(2, rank=rank, world=3) for rank in range(3)]
    for position in (0, 6, 12):
        assert torch.equal(torch.cat([one.batch(position) for one in ranks]), whole.batch(position))


def test_pixels_and_flips() -> None:
    plain, flipped = _loader(10, flip=False), _loader(10)
    ids, batch, mirrored = plain.ids(0), plain.batch(0), flipped.batch(0)
    expected = torch.from_numpy(IMAGES)[ids].permute(0, 3, 1, 2) / 127.5 - 1
    torch.testing.assert_close(batch, expected)
    same = [torch.equal(a, b) for a, b in zip(batch, mirrored, strict=True)]
    assert all(s or torch.equal(a, b.flip(2)) for s, a, b in zip(same, batch, mirrored, strict=True))
    shares = [
        sum(torch.equal(a, b) for a, b in zip(plain.batch(p), flipped.batch(p), strict=True)) for p in range(0, 400, 10)
    ]
    assert 0.4 < sum(shares) / 400 < 0.6  # about half, another half each epoch
    assert len(set(shares)) > 1


def test_jitter_shows_every_window() -> None:
    loader, plain = _loader(10, flip=False, jitter=1), _loader(10, flip=False)
    seen = set()
    for position in range(0, 300, 10):
        whole = plain.batch(position).clone()
        for number, window in enumerate(loader.batch(position)):
            (corner,) = [
                (top, left)
                for top in range(3)
                for left in range(3)
                if torch.equal(window, whole[number, :, top : top + 6, left : left + 6])
            ]
            seen.add(corner)
    assert len(seen) == 9
    mixed = _loader(10, jitter=1)
    assert not torch.equal(mixed.batch(0).clone(), mixed.batch(10))


def test_a_batch_may_be_larger_than_the_set() -> None:
    ids = _loader(25).ids(0)
    assert sorted(ids[:20].tolist()) == sorted([*range(10), *range(10)])


@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize(("rank", "world", "jitter"), [(0, 1, 0), (1, 2, 1)])
def test_resident_images_come_in_the_same_order(flip: bool, rank: int, world: int, jitter: int) -> None:
    batching = Batching(4, 8 - 2 * jitter, seed=3, flip=flip, jitter=jitter, rank=rank, world=world)
    packed, resident = PackedLoader(IMAGES, batching), ResidentLoader(IMAGES, batching)
    where = []
    step = 4 * world
    for position in (*range(0, 11 * step, step), step * 2, 100, 0):  # over epochs' ends, and back as a resumed run does
        for loader in (packed, resident):
            loader.prepare(position)
        start = torch.tensor(position)
        assert torch.equal(resident.current(start), packed.current(start))
        assert torch.equal(packed.current(start), PackedLoader(IMAGES, batching).batch(position))
        where.append(packed._staged[0].data_ptr())
    assert len(set(where)) == 1  # a CUDA graph reads it there
    ids = torch.tensor([3, 0, 3])
    assert torch.equal(packed.pixels(ids), resident.pixels(ids))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures of many shapes and formats, some of which have to be converted."""
    place = tmp_path_factory.mktemp("shapes")
    generator = np.random.default_rng(1)
    for number in range(40):
        shape = generator.integers(40, 160, 2)
        rough = generator.integers(0, 256, (*(shape // 8 + 2), 3), np.uint8)
        image = Image.fromarray(rough).resize((int(shape[1]), int(shape[0])), Image.Resampling.BICUBIC)
        if number % 10 == 3:
            image.putalpha(Image.fromarray(generator.integers(0, 256, shape, np.uint8)))
        if number % 10 == 5:
            image = image.convert("L")
        if number % 2 == 0:
            image.convert("RGB" if number % 10 else "CMYK").save(place / f"{number:02d}.jpg", quality=92)
        else:
            image.save(place / f"{number:02d}.png")
    exif = Image.Exif()
    exif[0x0112] = 8
    Image.open(place / "02.jpg").save(place / "turned.jpg", quality=92, exif=exif)
    Image.open(place / "04.jpg").save(place / "wide.jpg", quality=92, icc_profile=profiles.P3.profile())
    for suffix in ("avif", "bmp", "jp2", "ppm", "qoi", "tga", "tif", "webp"):
        Image.open(place / "06.jpg").save(place / f"format.{suffix}")
    Image.open(place / "06.jpg").convert("L").save(place / "grey.gif")
    return place


def _open(kind: str, data: Path, rank: int = 0, world: int = 1, **options: object) -> Loader:
    given: Any = {"data": str(data), "batch_size": 8, "loader": kind, "seed": 5, "workers": 1, **options}
    return open_loader(TrainConfig(**given), 24, CPU, lambda *_: None, rank=rank, world=world)[0]


@pytest.mark.parametrize("crop", ["center", "none", "32"])
def test_the_four_loaders_agree(folder: Path, crop: str) -> None:
    if not dali_loader.INSTALLED:
        pytest.skip("DALI is not installed")
    _parity(folder, crop, jitter=2)


def test_the_four_loaders_agree_on_photographs(orl: Path) -> None:
    if not dali_loader.INSTALLED:
        pytest.skip("DALI is not installed")
    _parity(orl, "center", jitter=0)


def _parity(data: Path, crop: str, jitter: int) -> None:
    options = {"crop": crop, "jitter": jitter}
    loaders = {kind: _open(kind, data, **options) for kind in KINDS}
    split = {(kind, rank): _open(kind, data, rank, 2, **options) for kind in KINDS for rank in range(2)}
    worst: dict[str, float] = {}
    for position in (0, 8, 16, 32, 40, 48):  # over an epoch's end, and a jump
        expected_ids, expected = loaders["packed"].ids(position), loaders["packed"].batch(position).clone()
        for kind in KINDS:
            assert torch.equal(loaders[kind].ids(position), expected_ids)
            batch = loaders[kind].batch(position)
            assert batch.is_contiguous(memory_format=torch.channels_last)
            worst[kind] = max(worst.get(kind, 0.0), 127.5 * (batch - expected).abs().mean().item())
            halves = [split[kind, rank] for rank in range(2)]
            assert torch.equal(torch.cat([half.ids(position) for half in halves]), expected_ids)
            torch.testing.assert_close(torch.cat([half.batch(position) for half in halves]), batch, rtol=0, atol=1e-6)
    assert worst["resident"] == 0 == worst["torch"] and worst["dali"] < 0.5, worst
    for loader in (*loaders.values(), *split.values()):
        loader.close()


@pytest.mark.parametrize("kind", KINDS)
def test_resuming_in_the_middle_of_an_epoch(folder: Path, kind: str) -> None:
    if kind == "dali" and not dali_loader.INSTALLED:
        pytest.skip("DALI is not installed")
    first, second = _open(kind, folder, jitter=1), _open(kind, folder, jitter=1)
    seen = [first.batch(position).clone() for position in range(0, 96, 8)]
    for position in range(24, 88, 8):  # 64 images, over the end of an epoch
        assert torch.equal(second.ids(position), first.ids(position))
        assert torch.equal(second.batch(position), seen[position // 8])
    for loader in (first, second):
        loader.close()


@pytest.mark.parametrize("kind", ["torch", "dali"])
@pytest.mark.filterwarnings("default")  # some are given in the processes of the DataLoader
def test_a_file_that_goes_bad_in_the_night(pictures: Path, kind: str) -> None:
    if kind == "dali" and not dali_loader.INSTALLED:
        pytest.skip("DALI is not installed")
    loader = _open(kind, pictures, batch_size=12)
    good = sorted(pictures.rglob("*.jpg"))
    good[0].unlink()
    content = good[1].read_bytes()
    good[1].write_bytes(content[: len(content) // 3])
    batches = [loader.batch(position).clone() for position in range(0, 48, 12)]
    assert all(batch.isfinite().all() and batch.std() > 0.1 for batch in batches)
    loader.close()


_LEFT_OPEN = """
import sys, torch
from fastbegan import TrainConfig
from fastbegan.data.choose import open_loader
train = TrainConfig(data=sys.argv[1], batch_size=4, loader="torch")
loader, *_ = open_loader(train, 16, torch.device("cpu"), lambda *_: None)
loader.batch(0)
if sys.argv[2] == "kill":
    for process in loader._batches._workers:
        process.terminate()
        process.join()
    for position in range(4, 64, 4):
        assert loader.batch(position).isfinite().all()
"""


@pytest.mark.slow
@pytest.mark.parametrize("way", ["open", "kill"])
def test_a_loader_that_is_left_open_or_loses_its_processes(pictures: Path, way: str) -> None:
    command = [sys.executable, "-W", "default", "-c", _LEFT_OPEN, str(pictures), way]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert ("this batch is read here" in done.stderr) == (way == "kill")


class _Lasting:
    """Its destructor ends in its own process only, as that of DALI's pipeline, which waits for threads."""

    def __init__(self) -> None:
        self.cycle, self.process = self, os.getpid()

    def __del__(self) -> None:
        if os.getpid() != self.process:
            time.sleep(600)


def test_a_forked_process_destroys_nothing_of_this_one(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    share = torch.Tensor.share_memory_

    def collect(batch: torch.Tensor) -> torch.Tensor:
        gc.collect()
        return share(batch)

    monkeypatch.setattr(torch.Tensor, "share_memory_", collect)  # called in the forked processes
    monkeypatch.setattr(files_loader, "_PATIENCE", 10)
    gc.disable()
    try:
        _Lasting()
        loader = _open("torch", pictures, batch_size=12)
        assert loader.batch(0).isfinite().all()
        assert gc.get_freeze_count() == 0
        loader.close()
    finally:
        gc.enable()


@pytest.mark.parametrize("state", ["asleep", "deaf"])
def test_a_process_that_hangs_is_given_up(pictures: Path, monkeypatch: pytest.MonkeyPatch, state: str) -> None:
    def hang(_: torch.Tensor) -> None:
        if state == "deaf":
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        time.sleep(600)

    monkeypatch.setattr(torch.Tensor, "share_memory_", hang)  # called in the forked processes
    monkeypatch.setattr(files_loader, "_PATIENCE", 1)
    monkeypatch.setattr("torch.utils.data._utils.MP_STATUS_CHECK_INTERVAL", 0.5)  # how long its end is waited for
    loader = _open("torch", pictures, batch_size=12)
    with pytest.warns(UserWarning, match="timed out after 1 seconds; this batch is read here, the next by new ones"):
        assert loader.batch(0).isfinite().all()
    loader.close()
    for process in multiprocessing.active_children():
        process.join(10)
    assert not multiprocessing.active_children()


@pytest.mark.skipif(not dali_loader.INSTALLED, reason="DALI is not installed")
def test_threads_of_dali_end_with_the_loader(pictures: Path) -> None:
    before = set(threading.enumerate())
    loader = _open("dali", pictures, batch_size=12)
    loader.batch(0)
    readers = set(threading.enumerate()) - before
    assert readers
    loader.close()
    for reader in readers:
        reader.join(10)
        assert not reader.is_alive()


@pytest.mark.parametrize("kind", ["torch", "dali"])
@pytest.mark.filterwarnings("default")
def test_a_folder_that_is_gone(pictures: Path, kind: str) -> None:
    if kind == "dali" and not dali_loader.INSTALLED:
        pytest.skip("DALI is not installed")
    loader = _open(kind, pictures, batch_size=12)
    pictures.rename(pictures.with_name("elsewhere"))
    with pytest.raises(UserError, match="none of the picture files can be decoded any more"):
        for position in range(0, 12 * 12, 12):
            loader.batch(position)
    loader.close()


def test_which_loader_and_why(monkeypatch: pytest.MonkeyPatch, pictures: Path) -> None:
    def line(kind: str, device: str = "cpu", **options: object) -> str:
        given: Any = {"data": str(pictures), "batch_size": 4, "loader": kind, **options}
        train = TrainConfig(**given)
        return open_loader(train, 16, torch.device(device), lambda *_: None)[1][0]

    assert line("auto").endswith("12 at 16 px, packed now; loader packed: no GPU")
    assert line("packed").endswith("loader packed: asked for")
    assert "; loader resident: 0.00 GB of " in line("resident")
    assert line("torch").endswith("12 of 12 good; loader torch: asked for")
    with pytest.raises(UserError, match="batch_size is 4; accepted on 3 ranks: multiples of 3"):
        open_loader(TrainConfig(data=str(pictures), batch_size=4), 16, CPU, lambda *_: None, world=3)
    with pytest.raises(UserError, match="'faces:20' is not made of picture files"):
        open_loader(TrainConfig(data="faces:20", loader="torch"), 16, CPU, lambda *_: None)
    monkeypatch.setattr(choose, "available_memory", lambda _: 2 * 12 * 16 * 16 * 3)
    with pytest.raises(UserError, match=r"loader resident would take 0.00 GB of 0.0 GB free; accepted: up to 40%"):
        line("resident")
    if dali_loader.INSTALLED:
        Image.new("RGBA", (40, 50)).save(pictures / "alpha.png")
        assert line("dali").endswith("loader dali: asked for; DALI converts nothing, 1 of them go through Pillow first")
    monkeypatch.setattr(choose.dali_loader, "INSTALLED", False)
    with pytest.raises(UserError, match=r"loader dali needs NVIDIA DALI: pip install 'fastbegan\[dali\]'"):
        line("dali")
    monkeypatch.setattr("fastbegan.data.prepare._require_room", _no_room)
    assert "loader torch: no room to pack them: full" in line("auto", crop="none")
    with pytest.raises(UserError, match="full"):
        line("packed", crop="20")


def _no_room(*_: object) -> None:
    from fastbegan.data.prepare import NoRoomError

    raise NoRoomError("full")


def test_a_step_of_resident_images_fits_the_set() -> None:
    with pytest.raises(ValueError, match="a step reads 11 images; accepted: up to the 10 there are"):
        ResidentLoader(IMAGES, Batching(11, 8, seed=0))


def test_dali_gets_the_number_of_its_gpu(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device without a number it takes for none, and then refuses the decoder that is on the GPU."""
    given: dict[str, Any] = {}
    dali = mock.MagicMock()
    dali.pipeline_def = lambda **options: given.update(options) or (lambda build: mock.MagicMock())
    monkeypatch.setenv("FASTBEGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(dali_loader, "INSTALLED", True)
    monkeypatch.setattr(torch.cuda, "Stream", lambda _: None)
    catalogue = load_catalogue(str(pictures), 16, Decoding(), lambda *_: None)
    loader = dali_loader.DaliLoader(catalogue, Batching(4, 8, 0, device=torch.device("cuda", 1)), Decoding())
    with mock.patch.object(dali_loader.importlib, "import_module", lambda _: dali):
        loader._start(0)
    loader.close()
    assert given["device_id"] == 1


def test_dalis_own_memory_is_copied_before_it_takes_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its next batch comes into the same buffer, maybe before the step has read this one."""
    told: list[str] = []

    class Stream:
        def synchronize(self) -> None:
            told.append("copied")

    class OnGpu(PackedLoader):
        def _read(self, position: int, ids: torch.Tensor, out: torch.Tensor) -> torch.Tensor:
            told.append("read")
            images = mock.MagicMock(wraps=super()._read(position, ids, out))
            images.device, images.clone = torch.device("cuda", 0), lambda: (told.append("clone"), out.clone())[1]
            return images

    loader = OnGpu(IMAGES, Batching(4, 8, 0))
    stream: Any = Stream()
    for name, value in {"stream": lambda _: mock.MagicMock(), "current_stream": lambda _: mock.MagicMock()}.items():
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(torch.cuda, "Event", mock.MagicMock)
    monkeypatch.setattr(loader, "_stream", stream)
    monkeypatch.setattr(loader, "_buffers", lambda window, **_: PackedLoader._buffers(loader, window))
    loader.prepare(0)
    loader.prepare(4)
    assert told == ["read", "clone", "copied"] * 2
