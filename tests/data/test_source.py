"""Sources: folders, tar and TFRecord files, torchvision's sets."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbegan import UserError
from fastbegan.data.decode import Decoding
from fastbegan.data.folder import LeftOut
from fastbegan.data.prepare import load_images
from fastbegan.data.source import Files, absolute, find_source, without_folders


def _images(data: object, size: int = 16, **options: object) -> np.ndarray:
    settings: dict = {"decoding": Decoding(), **options}
    return load_images(str(data), size, progress=lambda *_: None, **settings).images


def _field(number: int, body: bytes) -> bytes:
    length, tag = len(body), number << 3 | 2
    varint = b""
    while length > 127:
        varint, length = varint + bytes([length & 127 | 128]), length >> 7
    return bytes([tag]) + varint + bytes([length]) + body


def _example(**features: bytes) -> bytes:
    entries = b""
    for name, value in features.items():
        feature = _field(1, _field(1, value))  # Feature.bytes_list, BytesList.value
        entries += _field(1, _field(1, name.replace("_", "/").encode()) + _field(2, feature))
    return _field(1, entries)


def write_records(path: Path, records: list[bytes]) -> Path:
    with path.open("wb") as file:
        for record in records:
            file.write(struct.pack("<QI", len(record), 0) + record + b"\0" * 4)
    return path


@pytest.fixture
def sources(pictures: Path, tmp_path: Path) -> dict[str, Path]:
    """The same twelve pictures as a folder, a tar and a TFRecord file."""
    files = sorted(path for path in pictures.rglob("*.*") if path.is_file())
    with tarfile.open(tmp_path / "set.tar", "w") as tar:
        for number, path in enumerate(files):
            tar.add(path, f"{number:04d}{path.suffix}")
            label = tmp_path / "label.cls"
            label.write_text("7")
            tar.add(label, f"{number:04d}.cls")
    records = [_example(image_format=b"x" * 300, image_encoded=path.read_bytes()) for path in files]
    write_records(tmp_path / "set.tfrecord", records)
    return {"folder": pictures, "tar": tmp_path / "set.tar", "tfrecord": tmp_path / "set.tfrecord"}


def test_tar_and_tfrecord_hold_the_same_images(sources: dict[str, Path]) -> None:
    folder = _images(sources["folder"])
    assert len(folder) == 12
    for kind in ("tar", "tfrecord"):
        assert np.array_equal(_images(sources[kind]), folder), kind
    source = find_source(str(sources["tar"]))
    assert isinstance(source, Files) and [item.kind for item in source.left_out] == [".cls"] * 12  # labels


def test_a_folder_of_shards(sources: dict[str, Path], tmp_path: Path) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    for number, kind in enumerate(("tar", "tfrecord", "tar")):
        name = f"{number}.{kind}" if kind == "tar" else f"{number}.tfrecord-00000-of-00001"
        (shards / name).write_bytes(sources[kind].read_bytes())
    folder, source = _images(sources["folder"]), find_source(str(shards))
    assert source.total == 36 and source.description == f"images of 3 files in {shards}"
    assert np.array_equal(_images(shards), np.concatenate([folder] * 3))
    before = source.made_from(Decoding())
    (shards / "2.tar").unlink()
    assert find_source(str(shards)).made_from(Decoding()) != before


def test_a_changed_tar_is_packed_again(sources: dict[str, Path]) -> None:
    before = find_source(str(sources["tar"])).made_from(Decoding())
    assert (
        find_source(str(sources["tar"])).made_from(Decoding())
        == before
        != find_source(str(sources["tar"])).made_from(Decoding("none"))
    )
    sources["tar"].write_bytes(sources["tar"].read_bytes())
    assert find_source(str(sources["tar"])).made_from(Decoding()) != before


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda data: data[:-1], "record 11 is not whole .it is cut off"),
        (lambda data: data[:7], "record 0 is not whole"),
    ],
)
def test_damaged_records_are_named(sources: dict[str, Path], damage: Callable[[bytes], bytes], reason: str) -> None:
    path = sources["tfrecord"]
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(UserError, match=reason):
        find_source(str(path))


def test_records_without_a_picture_are_named_one_by_one(sources: dict[str, Path]) -> None:
    path = sources["tfrecord"]
    path.write_bytes(path.read_bytes().replace(b"image/encoded", b"image/encodex", 1))
    source = find_source(str(path))
    assert isinstance(source, Files) and source.total == 11
    kind = "records without image/encoded, which have image/encodex, image/format"
    assert source.left_out == [LeftOut(f"{path}:0", kind)]
    assert len(_images(path)) == 11


def test_a_damaged_tar_is_not_taken_for_a_shorter_one(sources: dict[str, Path]) -> None:
    content = bytearray(sources["tar"].read_bytes())
    with tarfile.open(sources["tar"]) as tar:
        places = [member.offset for member in tar]
    content[places[4] + 100] ^= 1
    sources["tar"].write_bytes(content)
    with pytest.raises(UserError, match=f"is damaged: what follows byte {places[4]:,} is no entry"):
        find_source(str(sources["tar"]))


@pytest.mark.parametrize("bad", ["pipe", "dangling"])
def test_a_shard_that_cannot_be_read_is_named(sources: dict[str, Path], tmp_path: Path, bad: str) -> None:
    shards = tmp_path / "shards"
    shards.mkdir()
    (shards / "0.tar").write_bytes(sources["tar"].read_bytes())
    if bad == "pipe":
        os.mkfifo(shards / "1.tar")
    else:
        (shards / "1.tar").symlink_to(shards / "nowhere")
    with pytest.raises(UserError, match=r"1\.tar is no file that can be read"):
        find_source(str(shards))


def test_no_records_and_no_tar(tmp_path: Path) -> None:
    (tmp_path / "empty.tfrecord").write_bytes(b"")
    assert find_source(str(tmp_path / "empty.tfrecord")).total == 0
    (tmp_path / "text.tar").write_text("x" * 2000)
    with pytest.raises(UserError, match="cannot be read as a tar file"):
        find_source(str(tmp_path / "text.tar"))


@pytest.mark.parametrize("bad", ["missing", "file", "missing.tar"])
def test_what_is_no_source_is_named(tmp_path: Path, bad: str) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(
        UserError,
        match=f"{bad}' (does not exist|is a file); accepted: 'faces', 'portraits', either with :COUNT, a folder",
    ):
        find_source(str(tmp_path / bad))


def _idx(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    header = struct.pack(f">HBB{values.ndim}I", 0, 8, values.ndim, *values.shape)
    with gzip.open(path, "wb") as file:
        file.write(header + values.tobytes())


@pytest.mark.parametrize(
    ("data", "shown"),
    [
        ("faces:64", "faces:64"),
        ("/home/me/photos/", "photos"),
        ("/a/b:c/faces.pack", "faces.pack"),
        ("cifar10:/home/me/sets", "cifar10:sets"),
        (".", "."),
    ],
)
def test_data_is_shown_without_its_folders(data: str, shown: str) -> None:
    assert without_folders(data) == shown


def test_fashion_mnist_from_its_files(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")
    pictures = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    raw = tmp_path / "FashionMNIST" / "raw"
    for part in ("train", "t10k"):
        _idx(raw / f"{part}-images-idx3-ubyte.gz", pictures)
        _idx(raw / f"{part}-labels-idx1-ubyte.gz", np.zeros(20, np.uint8))
    for path in list(raw.glob("*.gz")):
        path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
    data = f"fashion-mnist:{tmp_path}"
    assert absolute("fashion-mnist:x") == f"fashion-mnist:{Path('x').resolve()}" and absolute("faces:9") == "faces:9"
    assert absolute("./faces") == str(Path("faces").resolve())
    same = _images(data, 28)
    assert np.array_equal(same[..., 0], pictures) and np.array_equal(same[..., 0], same[..., 2])
    small = _images(data, 16)
    expected = Image.fromarray(pictures[3]).convert("RGB").resize((16, 16), Image.Resampling.BILINEAR)
    assert np.abs(small[3].astype(int) - np.asarray(expected)).max() <= 1
    with pytest.raises(UserError, match="crop celeba: 28x28; the crop celeba takes"):
        _images(data, 16, decoding=Decoding("celeba"))


def test_cifar_that_is_not_the_real_one_is_not_unpickled(tmp_path: Path) -> None:
    pytest.importorskip("torchvision")

    class Trap:
        def __reduce__(self) -> tuple[object, ...]:
            return (Path.touch, (tmp_path / "sprung",))

    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "batches.meta"):
        (folder / name).write_bytes(pickle.dumps(Trap()))
    with pytest.raises(UserError, match=r"cifar10:.*torchvision finds no CIFAR10 there"):
        find_source(f"cifar10:{tmp_path}")
    assert not (tmp_path / "sprung").exists()
