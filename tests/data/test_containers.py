"""Zip, tar and parquet files as people have them: the same images as the folder, and everything else counted."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import struct
import tarfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

from fastbegan import UserError
from fastbegan.data import containers
from fastbegan.data.decode import Decoding
from fastbegan.data.prepare import load_catalogue, load_images
from fastbegan.data.source import Files, find_source

Run = Callable[..., "CompletedProcess[str]"]


def _quiet(*_: object) -> None:
    pass


def _images(path: Path) -> np.ndarray:
    return load_images(str(path), 16, Decoding(), _quiet).images


@pytest.fixture
def files(pictures: Path) -> list[Path]:
    """Twelve pictures in the order of their folder."""
    return sorted((path for path in pictures.rglob("*.*") if path.is_file()), key=str)


def _zip(path: Path, members: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return path


def _tar(path: Path, members: dict[str, bytes], compress: Callable[[bytes], bytes] = bytes) -> Path:
    memory = io.BytesIO()
    with tarfile.open(fileobj=memory, mode="w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    path.write_bytes(compress(memory.getvalue()))
    return path


def _parquet(path: Path, **columns: Sequence[object]) -> Path:
    pytest.importorskip("pyarrow")
    from pyarrow import parquet, table

    parquet.write_table(table(columns), path, row_group_size=5)
    return path


def _members(files: list[Path]) -> dict[str, bytes]:
    return {f"{number:04d}{path.suffix}": path.read_bytes() for number, path in enumerate(files)}


MAKERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "a.zip": _zip,
    "b.ZIP": lambda path, members: _zip(path, members, zipfile.ZIP_DEFLATED),
    "c.TAR": _tar,
    "d.tar.gz": lambda path, members: _tar(path, members, gzip.compress),
    "e.tgz": lambda path, members: _tar(path, members, gzip.compress),
    "f.tar.xz": lambda path, members: _tar(path, members, lzma.compress),
    "g.tbz2": lambda path, members: _tar(path, members, bz2.compress),
    "gzipped.tar": lambda path, members: _tar(path, members, gzip.compress),
    "h.parquet": lambda path, members: _parquet(path, image=[{"bytes": c, "path": n} for n, c in members.items()]),
    "i.parquet": lambda path, members: _parquet(path, label=list(range(len(members))), img=list(members.values())),
}
RANDOM = ("a.zip", "c.TAR")  # members of these can be read by themselves


FAST = ("a.zip", "b.ZIP", "d.tar.gz", "h.parquet")
ALL = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in MAKERS]


@pytest.mark.parametrize("name", ALL)
def test_archives_hold_the_same_images_as_the_folder(
    name: str, files: list[Path], pictures: Path, tmp_path: Path
) -> None:
    path = MAKERS[name](tmp_path / name, _members(files))
    assert np.array_equal(_images(path), _images(pictures))
    source = find_source(str(path))
    assert isinstance(source, Files) and (source.stream is None) == (name in RANDOM)
    if name in RANDOM:
        assert len(load_catalogue(str(path), 16, Decoding(), _quiet).entries) == 12
    else:
        with pytest.raises(UserError, match=f"{name} can only be read from front to back.*take loader packed"):
            load_catalogue(str(path), 16, Decoding(), _quiet)


def test_a_folder_of_all_kinds_of_archives(files: list[Path], pictures: Path, tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    for name, make in MAKERS.items():
        make(folder / name, _members(files))
    Image.new("RGB", (4, 4)).save(folder / "preview.png")
    (folder / "README.md").write_text("read me")
    image_set = load_images(str(folder), 16, Decoding(), _quiet)
    assert np.array_equal(image_set.images, np.concatenate([_images(pictures)] * len(MAKERS)))
    assert image_set.remarks[:2] == (
        f"left out (pictures beside archives): 1, such as {folder / 'preview.png'}",
        f"left out (.md): 1, such as {folder / 'README.md'}",
    )


def test_pictures_with_their_own_archive_beside_them(pictures: Path, files: list[Path]) -> None:
    _zip(pictures / "all.zip", _members(files))
    image_set = load_images(str(pictures), 16, Decoding(), _quiet)
    assert len(image_set.images) == 12
    assert image_set.remarks[0] == f"left out (archives that are not read): 1, such as {pictures / 'all.zip'}"


def test_stylegan_and_webdataset_names(files: list[Path], pictures: Path, tmp_path: Path) -> None:
    members = _members(files)
    stylegan = {f"00000/img{number}.png": content for number, content in enumerate(members.values())}
    zipped = _zip(tmp_path / "stylegan.zip", {**stylegan, "dataset.json": b"{}"})
    assert np.array_equal(_images(zipped), _images(pictures))
    names = ("img", "image", "input.jpg", "IMG")
    keys = {f"{n:04d}.{names[n % 4]}": content for n, content in enumerate(members.values())}
    labels = {f"{number:04d}.cls": b"7" for number in range(len(members))}
    shard = _tar(tmp_path / "web.tar", {**keys, **labels, "9999.json": b"{}"})
    image_set = load_images(str(shard), 16, Decoding(), _quiet)
    assert np.array_equal(image_set.images, _images(pictures))
    assert image_set.remarks[:2] == (
        f"left out (.cls): 12, such as {shard}:0000.cls",
        f"left out (.json): 1, such as {shard}:9999.json",
    )


def test_odd_members_of_a_tar_are_counted(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "odd.tar"
    with tarfile.open(path, "w") as tar:
        tar.add(files[0], "a.jpg")
        tar.add(files[1], ".hidden/b.jpg")
        for kind, name in ((tarfile.SYMTYPE, "c.jpg"), (tarfile.LNKTYPE, "d.jpg"), (tarfile.FIFOTYPE, "e.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "a.jpg"
            tar.addfile(info)
    kinds = ["hidden", "links in an archive", "links in an archive", "sparse or special files in a tar"]
    for archive in (path, tmp_path / "odd.tar.gz"):
        if archive != path:
            archive.write_bytes(gzip.compress(path.read_bytes()))
        source = find_source(str(archive))
        assert isinstance(source, Files)
        (part,) = source.parts(0, 8, Decoding(), 1)
        assert [item.kind for item in source.left_out] == kinds and len(part.pixels) == 1
        assert source.names == [f"{archive}:a.jpg"]


def test_broken_members_are_named_one_by_one(files: list[Path], tmp_path: Path) -> None:
    members = _members(files)
    members["0003.png"] = b"no picture"
    encrypted = _zip(tmp_path / "set.zip", members, zipfile.ZIP_DEFLATED)
    content = bytearray(encrypted.read_bytes())
    content[content.rindex(b"0004.") - 46 + 8] |= 1  # "encrypted", in the directory at the end
    encrypted.write_bytes(content)
    rows = _parquet(tmp_path / "set.parquet", image=[*members.values(), None])
    cells = [{"bytes": None, "path": "a.jpg"}, {"bytes": members["0000.png"], "path": None}]
    nested = _parquet(tmp_path / "paths.parquet", image=cells)
    for path, reasons in (
        (encrypted, {"0003.png": "cannot identify image file", "0004.png": "encrypted"}),
        (rows, {"3": "cannot identify image file", "12": "the row has no bytes"}),
        (nested, {"0 a.jpg": "the row has no bytes"}),
    ):
        catalogue = load_catalogue(str(path), 16, Decoding(), _quiet, again=True, max_bad=100)
        assert dict(catalogue.broken) == {f"{path}:{name}": reason for name, reason in reasons.items()}


@pytest.mark.parametrize("name", ["a.zip", "c.TAR", "d.tar.gz", "f.tar.xz", "g.tbz2"])
def test_a_damaged_archive_is_not_taken_for_a_shorter_one(name: str, files: list[Path], tmp_path: Path) -> None:
    path = MAKERS[name](tmp_path / name, _members(files))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) * 2 // 3])
    with pytest.raises(UserError, match=f"{name} (cannot be read as a|is damaged)"):
        _images(path)


def test_a_damaged_header_within_a_compressed_tar(files: list[Path], tmp_path: Path) -> None:
    path = _tar(tmp_path / "set.tar.gz", _members(files), gzip.compress)
    content = bytearray(gzip.decompress(path.read_bytes()))
    place = content.index(b"0005.")
    content[place + 100] ^= 1
    path.write_bytes(gzip.compress(content))
    with pytest.raises(UserError, match=f"is damaged: what follows byte {place:,} is no entry"):
        _images(path)


def test_a_zip_whose_directory_points_elsewhere(files: list[Path], tmp_path: Path) -> None:
    path = _zip(tmp_path / "set.zip", _members(files))
    content = bytearray(path.read_bytes())
    struct.pack_into("<I", content, content.rindex(b"0004.") - 46 + 42, 17)  # where its own header is
    path.write_bytes(content)
    catalogue = load_catalogue(str(path), 16, Decoding(), _quiet, again=True, max_bad=100)
    assert catalogue.broken == [(f"{path}:0004.png", "its place in the zip file holds no member")]


def test_parquet_without_pictures_names_its_columns(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "table.parquet", text=["a", "b"], number=[1, 2])
    with pytest.raises(UserError, match=r"has no images.*without a column of pictures .*, which have text, number\)"):
        _images(path)
    (tmp_path / "text.parquet").write_text("no table")
    with pytest.raises(UserError, match=r"text\.parquet cannot be read as a parquet file"):
        find_source(str(tmp_path / "text.parquet"))


def test_parquet_without_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.parquet").write_bytes(b"")

    def missing(name: str) -> object:
        raise ImportError(name)

    monkeypatch.setattr(containers.importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"needs pyarrow: pip install 'fastbegan\[parquet\]'"):
        find_source(str(tmp_path / "a.parquet"))


def test_an_archive_that_is_read_once_is_taken_up_after_a_kill(
    files: list[Path], pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbegan.data.source._CHUNK", 4)
    monkeypatch.setenv("FASTBEGAN_CACHE", str(tmp_path / "cache"))
    Image.new("RGBA", (30, 20)).save(pictures / "00.png")
    files = sorted((path for path in pictures.rglob("*.*") if path.is_file()), key=str)
    path = _tar(tmp_path / "set.tgz", {**_members(files), "labels.csv": b""}, gzip.compress)

    def killed(what: str, done: int, total: int) -> None:
        assert total == 0
        if done == 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_images(str(path), 16, Decoding(), killed)
    told: list[int] = []
    image_set = load_images(str(path), 16, Decoding(), lambda what, done, total: told.append(done))
    assert told[0] == 12 and np.array_equal(image_set.images, _images(pictures))
    assert image_set.remarks[0] == f"left out (.csv): 1, such as {path}:labels.csv"
    assert (
        f"converted (rotated, or of another mode than 8-bit RGB or grey): 1, such as {path}:{0:04d}.png"
        in image_set.remarks
    )


def test_large_members_are_not_held_in_number(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks for the decoding processes end where their content reaches a limit."""
    from fastbegan.data import workers

    def entries() -> Iterator[workers.Entry]:
        for number in range(100):
            yield workers.Entry(str(number), data=bytes(3 << 20))

    assert len(workers._chunk(entries())) == 3
    monkeypatch.setattr(containers, "MAX_BYTES", 10)
    path = _zip(tmp_path / "set.zip", {"a.png": bytes(11)}, zipfile.ZIP_DEFLATED)
    catalogue = load_catalogue(str(path), 16, Decoding(), _quiet, again=True, max_bad=100)
    assert catalogue.broken[0][1].endswith("accepted: up to 0 MiB")


KINDS = {
    "x.avif.txt": (b"text", ".txt"),
    "photo.heic": (b"\0\0\0\x18ftypheic", ".heic"),
    "LICENSE": (b"free", "without a suffix"),
    "data.mdb": (b"\0" * 100, ".mdb"),
    "raw.NEF": (b"MM\0*" + b"\0" * 100, ".nef"),
}


def test_what_the_first_bytes_tell(pictures: Path, tmp_path: Path) -> None:
    content = (pictures / "02.jpg").read_bytes()
    for name in ("hash0123", "photo.JPE", "scan.dat", "webdataset.img"):
        (pictures / name).write_bytes(content)
    for name, (data, _) in KINDS.items():
        (pictures / name).write_bytes(data)
    image_set = load_images(str(pictures), 16, Decoding(), _quiet)
    assert len(image_set.images) == 16
    said = {line.partition("): 1,")[0] for line in image_set.remarks if "left out" in line}
    assert said == {f"left out ({kind}" for _, kind in KINDS.values()}


def test_a_source_without_one_picture(tmp_path: Path, fastbegan: Run) -> None:
    path = _tar(tmp_path / "labels.tar", {f"{number}.json": b"{}" for number in range(20)})
    done = fastbegan("data", "check", path)
    assert (
        done.returncode == 1 and f"0 of 0 good, 0 broken\n  left out (.json): 20, such as {path}:0.json" in done.stdout
    )
    for command in (("data", "pack", path, tmp_path / "x.pack"), ("train", "--data", path, "--out", tmp_path / "run")):
        done = fastbegan(*command)
        assert done.returncode == 2 and "has no images" in done.stderr and "left out (.json): 20" in done.stderr


def test_an_archive_without_pictures_does_not_displace_those_beside_it(pictures: Path) -> None:
    content = np.random.default_rng(0).integers(0, 256, 1 << 20, np.uint8).tobytes()
    _zip(pictures / "model.zip", {"weights.bin": content})
    _parquet(pictures / "embeddings.parquet", text=[content])
    (pictures / "damaged.tar").write_bytes(content)
    with pytest.warns(UserWarning, match=r"damaged\.tar cannot be read .*; the pictures beside it are taken"):
        image_set = load_images(str(pictures), 16, Decoding(), _quiet)
    kind = "left out (archives that are not read)"
    assert len(image_set.images) == 12 and image_set.remarks == (f"{kind}: 3, such as {pictures / 'damaged.tar'}",)


def test_a_damaged_shard_beside_a_preview_and_good_shards_is_named(files: list[Path], tmp_path: Path) -> None:
    folder = tmp_path / "shards"
    folder.mkdir()
    (folder / "preview.png").write_bytes(files[0].read_bytes())
    for number in range(3):
        _tar(folder / f"{number}.tar", _members(files))
    (folder / "1.tar").write_bytes(b"x" * 2000)
    with pytest.raises(UserError, match=r"1\.tar cannot be read as a tar file"):
        find_source(str(folder))


def test_what_lies_beside_records_is_no_record(files: list[Path], tmp_path: Path) -> None:
    from tests.data.test_source import _example, write_records

    folder = tmp_path / "shards"
    folder.mkdir()
    write_records(folder / "a.tfrecord-00000-of-00001", [_example(image_encoded=file.read_bytes()) for file in files])
    write_records(folder / "b.tfrecords", [_example(image_encoded=b"")])
    (folder / "a.tfrecord.idx").write_text("0 100")
    source = find_source(str(folder))
    assert isinstance(source, Files) and source.total == 13 and [item.kind for item in source.left_out] == [".idx"]


def test_names_of_windows(files: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "set.zip"
    _zip(path, {"a/1.jpg": files[1].read_bytes(), "__MACOSX/a/._1.jpg": b"resource"})
    path.write_bytes(path.read_bytes().replace(b"a/._1", b"a\\._1").replace(b"__MACOSX/", b"__MACOSX\\"))
    source = find_source(str(path))
    assert isinstance(source, Files) and source.total == 1 and [item.kind for item in source.left_out] == ["hidden"]


def test_a_tar_without_its_end_mark_is_told(files: list[Path], tmp_path: Path) -> None:
    path = _tar(tmp_path / "set.tar", _members(files))
    with tarfile.open(path) as tar:
        last = tar.getmembers()[-1].offset
    content = path.read_bytes()[:last]
    for name, data in (("cut.tar", content), ("cut.tgz", gzip.compress(content))):
        (tmp_path / name).write_bytes(data)
        image_set = load_images(str(tmp_path / name), 16, Decoding(), _quiet)
        assert len(image_set.images) == 11
        assert image_set.remarks[0].startswith("left out (what may have followed in a tar file without an end mark): 1")


def _hostile(kind: str, path: Path, members: dict[str, bytes]) -> None:
    """Archives on which the libraries raise something of their own."""
    if kind == "pax":
        info = tarfile.TarInfo("a.png")
        info.pax_headers = {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.size": "x"}
        path.write_bytes(info.tobuf(tarfile.PAX_FORMAT) + bytes(1024))
    elif kind == "names":
        name = tarfile.TarInfo("././@LongLink")
        name.type, name.size = tarfile.GNUTYPE_LONGNAME, 10
        path.write_bytes((name.tobuf(tarfile.GNU_FORMAT) + b"a.png".ljust(512, b"\0")) * 2000)
    elif kind == "version":
        content = bytearray(_zip(path, members).read_bytes())
        content[content.rindex(b"PK\x01\x02") + 6] = 99
        path.write_bytes(content)
    else:
        content = bytearray(_zip(path, {f"{n}": bytes(5000) for n in range(3)}, zipfile.ZIP_LZMA).read_bytes())
        content[40:60] = b"\xff" * 20
        path.write_bytes(content)


@pytest.mark.parametrize(
    ("kind", "name"), [("pax", "a.tar"), ("names", "b.tar"), ("version", "c.zip"), ("lzma", "d.zip")]
)
def test_archives_that_trip_the_libraries_are_one_line(
    kind: str, name: str, files: list[Path], tmp_path: Path, fastbegan: Run
) -> None:
    _hostile(kind, tmp_path / name, _members(files))
    done = fastbegan("data", "check", tmp_path / name)
    assert done.returncode == (1 if kind == "lzma" else 2), done.stdout + done.stderr  # of that zip, each member counts
    assert kind == "lzma" or f"{name} cannot be read as a" in done.stderr


def test_wide_tables_are_named_in_a_few_words(tmp_path: Path) -> None:
    path = _parquet(tmp_path / "wide.parquet", **{f"c{number:04d}": [1] for number in range(1000)})
    with pytest.raises(UserError, match="which have c0000, c0001, c0002, c0003, c0004 and 995 more"):
        _images(path)
    assert len(_images(_parquet(tmp_path / "Image.parquet", Image=[_png()]))) == 1


def _png() -> bytes:
    with io.BytesIO() as file:
        Image.new("RGB", (20, 20)).save(file, "PNG")
        return file.getvalue()
