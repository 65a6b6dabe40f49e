"""Nearest training images: as brute force finds them, mirrored or not, in one part or in many."""

from __future__ import annotations

import numpy as np
import pytest

from fastbegan.evaluation import nearest as nearest_module
from fastbegan.evaluation.nearest import compare, nearest


def _brute(query: np.ndarray, images: np.ndarray, flip: bool) -> list[tuple[float, int, bool]]:
    found = []
    for number, image in enumerate(images.astype(float)):
        straight = float(np.sqrt(((image - query) ** 2).mean()))
        turned = float(np.sqrt(((image[:, ::-1] - query) ** 2).mean())) if flip else straight
        found.append((min(straight, turned), number, turned < straight))
    return sorted(found)


def _noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(len(shape) + shape[0]).integers(0, 256, shape, np.uint8)


@pytest.mark.parametrize("flip", [False, True])
@pytest.mark.parametrize("chunk", [7, 1 << 20], ids=["parts", "whole"])
@pytest.mark.parametrize("margin", [0, 2])
def test_as_brute_force_finds_them(flip: bool, chunk: int, margin: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nearest_module, "_CHUNK_BYTES", chunk * 8 * 8 * 3 * 4)
    images, queries = _noise(200, 8 + 2 * margin, 8 + 2 * margin, 3), _noise(6, 8, 8, 3)
    middle = images[:, margin : margin + 8, margin : margin + 8]
    queries[0], queries[1] = middle[130], middle[77, :, ::-1]  # a copy and a mirrored copy
    queries[2] = np.clip(middle[5].astype(int) + 3, 0, 255)
    told: list[tuple[int, int]] = []
    found = nearest(queries, images, 5, flip=flip, progress=lambda _, done, total: told.append((done, total)))
    for query, row in zip(queries, found, strict=True):
        wanted = _brute(query, middle, flip)[:5]
        assert [(one.number, one.mirrored) for one in row] == [(number, turned) for _, number, turned in wanted]
        assert [one.distance for one in row] == pytest.approx([distance for distance, *_ in wanted])
    assert found[0][0].number == 130 and found[0][0].distance == 0 and not found[0][0].mirrored
    assert (found[1][0].number == 77 and found[1][0].mirrored and found[1][0].distance == 0) == flip
    assert found[2][0].number == 5 and found[2][0].distance <= 3
    assert told[-1] == (200, 200) and len(told) == (29 if chunk == 7 else 1)


def test_an_image_is_not_its_own_neighbour() -> None:
    images = _noise(30, 4, 4, 3)
    images[20] = images[3]
    found = nearest(images[[3, 4]], images, 3, flip=True, excluded=np.array([3, -1]))
    assert (found[0][0].number, found[0][0].distance) == (20, 0) and 3 not in [one.number for one in found[0]]
    assert (found[1][0].number, found[1][0].distance) == (4, 0)


def test_ties_go_by_number_and_small_sets_have_fewer_neighbours() -> None:
    images = np.zeros((4, 4, 4, 3), np.uint8)
    images[0] = 10
    found = nearest(images[:1], images, 9, flip=True, excluded=np.array([0]))
    assert [one.number for one in found[0]] == [1, 2, 3] and [one.distance for one in found[0]] == [10, 10, 10]
    assert nearest(images[:1], images[:1], 5, flip=False, excluded=np.array([0])) == [[]]


def test_read_only_memory_maps_are_taken(tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.mktemp("map") / "images"
    _noise(50, 4, 4, 3).tofile(path)
    images = np.memmap(path, np.uint8, "r", shape=(50, 4, 4, 3))
    assert nearest(np.array(images[7:8]), images, 1, flip=True)[0][0].number == 7


def test_images_that_are_too_small_are_refused() -> None:
    with pytest.raises(ValueError, match="images are 4 px; queries of 8 px need at least as many"):
        nearest(_noise(1, 8, 8, 3), _noise(5, 4, 4, 3), 1, flip=False)


def test_comparison_with_how_near_training_images_are() -> None:
    images = _noise(300, 6, 6, 3)
    samples = np.stack([images[9], images[11, :, ::-1], images[12]])[:, 1:5, 1:5]
    seen = compare(samples, images, 2, flip=True, seed=0)
    middle = images[:, 1:5, 1:5]
    chosen = np.sort(np.random.default_rng(0).choice(300, 200, replace=False))
    others = [next(d for d, number, _ in _brute(middle[own], middle, True) if number != own) for own in chosen]
    assert seen.between_training == pytest.approx(np.median(others))
    assert (seen.total, seen.measured, seen.to_training) == (300, 200, 0)
    assert [[len(row) for row in seen.rows], len(seen.pictures)] == [[2, 2, 2], 3]
    for row in seen.pictures:
        assert np.array_equal(row[0], row[1])  # the mirrored one is shown as it was compared
    assert seen.rows[1][0].mirrored
    alone = compare(samples[:1], images[:1], 5, flip=False, seed=0)
    assert alone.between_training is None and alone.measured == 1 and len(alone.rows[0]) == 1
