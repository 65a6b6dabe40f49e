"""The order of images: every image once an epoch, a function of (seed, position)."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fastbegan.data.loader import PackedLoader, ResidentLoader, make_loader

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 8, 8, 3), np.uint8)


def _loader(batch_size: int = 4, seed: int = 0, flip: bool = True) -> PackedLoader:
    return PackedLoader(IMAGES, batch_size=batch_size, seed=seed, flip=flip)


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
    assert torch.equal(torch.cat([small.batch(p) for p in (6, 8, 10)]), large.batch(6))


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


def test_a_batch_may_be_larger_than_the_set() -> None:
    ids = _loader(25).ids(0)
    assert sorted(ids[:20].tolist()) == sorted([*range(10), *range(10)])


@pytest.mark.parametrize("flip", [True, False])
def test_resident_images_come_in_the_same_order(flip: bool) -> None:
    options = {"batch_size": 4, "seed": 3, "flip": flip}
    packed, resident = PackedLoader(IMAGES, **options), ResidentLoader(IMAGES, **options)
    where = []
    for position in (*range(0, 44, 4), 8, 100, 0):  # over the ends of epochs, and back as a resumed run does
        for loader in (packed, resident):
            loader.prepare(position)
        start = torch.tensor(position)
        assert torch.equal(resident.current(start), packed.batch(position))
        assert torch.equal(packed.current(start), packed.batch(position))
        where.append(packed.current(start).data_ptr())
    assert len(set(where)) == 1  # a CUDA graph reads it there


def test_resident_only_on_a_gpu_with_room(monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"batch_size": 4, "seed": 0, "flip": True}
    loader, line = make_loader(IMAGES, **options, device=torch.device("cpu"))
    assert type(loader) is PackedLoader and line == "from the packed file"
    with pytest.raises(ValueError, match="batch_size is 11; accepted: up to the 10 images there are"):
        ResidentLoader(IMAGES, batch_size=11, seed=0)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (IMAGES.nbytes, 10 * IMAGES.nbytes))
    loader, line = make_loader(IMAGES, **options, device=torch.device("cuda", 0))
    assert type(loader) is PackedLoader and line.startswith("copied batch by batch")
