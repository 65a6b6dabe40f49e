"""--data to a packed set: made once, remade when its source changed or the file is damaged."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from fastbegan import UserError
from fastbegan.data import source
from fastbegan.data.pack import DamagedPackError, read_pack, write_pack
from fastbegan.data.source import load_images


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was made, chunk by chunk, in a cache of this test's own."""
    monkeypatch.setenv("FASTBEGAN_CACHE", str(tmp_path / "cache"))
    return []


def _load(data: object, made: list[str], **options: object) -> np.ndarray:
    settings: dict = {"size": 16, "crop": "center", **options}
    return load_images(str(data), progress=lambda what, done, total: made.append(what), **settings).images


def test_a_folder_is_packed_once(pictures: Path, made: list[str]) -> None:
    first = _load(pictures, made)
    assert first.shape == (12, 16, 16, 3) and first.dtype == np.uint8
    again = _load(pictures, made)
    assert made == ["packing images"]
    assert np.array_equal(first, again) and isinstance(again, np.memmap)
    _load(pictures, made, size=8)
    _load(pictures, made, crop="none")
    assert len(made) == 3


def test_a_changed_folder_is_packed_again(pictures: Path, made: list[str]) -> None:
    _load(pictures, made)
    os.utime(pictures / "01.png", (1, 1))
    _load(pictures, made)
    (pictures / "02.jpg").unlink()
    assert len(_load(pictures, made)) == 11
    assert len(made) == 3


def test_a_damaged_pack_is_packed_again(pictures: Path, made: list[str], tmp_path: Path) -> None:
    expected = np.array(_load(pictures, made))
    (pack,) = (tmp_path / "cache").glob("*.pack")
    content = bytearray(pack.read_bytes())
    content[5000] ^= 255
    pack.write_bytes(content)
    with pytest.warns(UserWarning, match="does not match its checksum; packing again"):
        assert np.array_equal(_load(pictures, made), expected)


def test_few_broken_files_are_left_out_by_name_and_many_refuse_the_folder(pictures: Path, made: list[str]) -> None:
    (pictures / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(
        UserError, match=r"1 of 13 images are broken .*broken\.jpg: cannot identify.*max_bad accepts 1 percent"
    ):
        _load(pictures, made)
    assert not list(source.cache_folder().glob("*.pack"))
    with pytest.warns(UserWarning, match=r"broken\.jpg: cannot identify.*left out"):
        assert len(_load(pictures, made, max_bad=10.0)) == 12
    (report,) = source.cache_folder().glob("*.rejected.txt")
    assert "broken.jpg\tbroken: cannot identify" in report.read_text()
    with pytest.raises(UserError, match="1 of 13"):  # packed by now, and still too many for this caller
        _load(pictures, made)


def test_a_folder_called_faces_is_named_with_its_path(
    pictures: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures.rename(pictures.with_name("faces"))
    monkeypatch.chdir(pictures.parent)
    assert len(_load("./faces", made)) == 12
    assert len(_load("faces:20", made)) == 20


@pytest.mark.parametrize("data", ["faces:0", "faces:many", "faces:-3"])
def test_wrong_counts_of_faces_are_named(data: str, made: list[str]) -> None:
    with pytest.raises(UserError, match="accepted: 'faces', 'faces:COUNT'"):
        _load(data, made)


def test_too_few_images_are_named(tmp_path: Path, pictures: Path, made: list[str]) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="has no images; a batch needs 1"):
        _load(tmp_path / "empty", made)
    with pytest.raises(UserError, match="has only 12 images; a batch needs 16"):
        _load(pictures, made, minimum=16)
    with pytest.raises(UserError, match="has only 5 images; a batch needs 16"):
        _load("faces:5", made, minimum=16)


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FASTBEGAN_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="cannot be written to"):
        _load("faces:4", [])


def test_pack_round_trip_and_damage(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    images = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)
    write_pack(path, [images[:2], images[2:]], 4, "test")
    read, header = read_pack(path)
    assert np.array_equal(read, images) and (header.count, header.source) == (5, "test")
    content = path.read_bytes()
    for damaged, reason in (
        (content[:-1], "its header says"),
        (content[:100], "unreadable header|its header says"),
        (b"x" + content[1:], "does not start like a pack"),
        (content[:-1] + bytes([content[-1] ^ 1]), "checksum"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DamagedPackError, match=reason):
            read_pack(path)


def test_a_failure_while_packing_leaves_nothing(tmp_path: Path) -> None:
    def chunks():
        yield np.zeros((2, 4, 4, 3), np.uint8)
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError):
        write_pack(tmp_path / "a.pack", chunks(), 4, "test")
    assert list(tmp_path.iterdir()) == []
