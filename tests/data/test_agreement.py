"""`data check`, `data pack`, `train` and `evaluate` say the same about each source, item by item."""

from __future__ import annotations

import gzip
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

from fastbegan.data import report
from tests.data.test_containers import _parquet, _tar, _zip
from tests.data.test_source import _example, write_records

Run = Callable[..., "CompletedProcess[str]"]
GOOD, SMALL, GREY, DEEP = 16, 3, 2, 1


def _pictures(folder: Path) -> dict[str, bytes]:
    """Twenty-two good pictures, of which six are worth a word."""
    generator = np.random.default_rng(0)
    for number in range(GOOD):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), np.uint8)).save(folder / f"a{number:02d}.png")
    for number in range(SMALL):
        Image.fromarray(generator.integers(0, 256, (8, 40, 3), np.uint8)).save(folder / f"b{number:02d}.jpg")
    for number in range(GREY):
        Image.fromarray(generator.integers(0, 256, (40, 40, 4), np.uint8)).save(folder / f"c{number:02d}.webp")
    for number in range(DEEP):
        Image.fromarray(generator.integers(0, 4096, (40, 40)).astype(np.uint16)).save(folder / f"d{number:02d}.png")
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def _folder(place: Path, members: dict[str, bytes]) -> Path:
    (place / "set").mkdir()
    for name, content in members.items():
        (place / "set" / name).write_bytes(content)
    return place / "set"


def _shards(place: Path, members: dict[str, bytes]) -> Path:
    folder = _folder(place, {"preview.png": members["a00.png"]})
    names = list(members)
    _tar(folder / "0.TAR", {name: members[name] for name in names[:8]})
    _tar(folder / "1.tar.gz", {name: members[name] for name in names[8:16]}, gzip.compress)
    _zip(folder / "2.zip", {name: members[name] for name in names[16:]})
    return folder


def _records(place: Path, members: dict[str, bytes]) -> Path:
    records = [_example(image_encoded=content) for content in members.values()]
    return write_records(place / "set.tfrecord", [*records, _example(data=b"raw", shape=b"3")])


OTHERS = {"notes.txt": b"notes", "more.txt": b"", "photo.heic": b"\0\0\0\x18ftypheic", ".hidden.png": b""}
WORDS = {
    ("converted", "rotated, or of another mode than 8-bit RGB or grey"): GREY + DEEP,
    ("dark", "16-bit files that use 12 bits or fewer"): DEEP,
    ("enlarged", "smaller than the images that were asked for"): SMALL,
}
_OTHERS = {("left out", ".txt"): 2, ("left out", ".heic"): 1, ("left out", "hidden"): 1}
_KEYS = ("left out", "records without image/encoded, which have data, shape")
SOURCES: dict[str, tuple[Callable[[Path, dict[str, bytes]], Path], dict[tuple[str, str], int]]] = {
    "folder": (lambda place, members: _folder(place, {**members, **OTHERS}), _OTHERS),
    "tar": (lambda place, members: _tar(place / "set.tar", {**members, **OTHERS}), _OTHERS),
    "tgz": (lambda place, members: _tar(place / "set.tgz", {**members, **OTHERS}, gzip.compress), _OTHERS),
    "zip": (lambda place, members: _zip(place / "s.zip", {**members, **OTHERS}, zipfile.ZIP_DEFLATED), _OTHERS),
    "parquet": (lambda place, members: _parquet(place / "set.parquet", image=list(members.values())), {}),
    "tfrecord": (_records, {_KEYS: 1}),
    "shards": (_shards, {("left out", "pictures beside archives"): 1}),
}
_REMARK = re.compile(rf"(left out|{'|'.join(report._MEANINGS)}) \(([^)]*)\): ([\d,]+), such as /")


def _said(output: str) -> dict[tuple[str, str], int]:
    """Kinds with their counts, of all lines that a command wrote."""
    return {(kind, what): int(count.replace(",", "")) for kind, what, count in _REMARK.findall(output)}


FAST = ("shards",)
ALL = [name if name in FAST else pytest.param(name, marks=pytest.mark.slow) for name in SOURCES]


@pytest.mark.parametrize("kind", ALL)
def test_all_commands_say_the_same(kind: str, tmp_path: Path, fastbegan: Run) -> None:
    (tmp_path / "made").mkdir()
    members = _pictures(tmp_path / "made")
    make, left_out = SOURCES[kind]
    source = make(tmp_path, {**members, "z.jpg": b"broken"})
    checked = fastbegan("data", "check", source, "--size", 32)
    assert checked.returncode == 1 and f"{len(members)} of {len(members) + 1} good, 1 broken" in checked.stdout
    expected = {**left_out, **WORDS}
    assert _said(checked.stdout) == expected, checked.stdout
    packed = fastbegan("data", "pack", source, tmp_path / "set.pack", "--size", 32, "--max-bad", 10)
    flags = ("--size", 32, "--filters", 4, "--steps", 1, "--batch-size", 4, "--max-bad", 10)
    trained = fastbegan("train", *flags, "--data", source, "--out", tmp_path / "run")
    from_pack = fastbegan("train", *flags, "--data", tmp_path / "set.pack", "--out", tmp_path / "other")
    scored = fastbegan("evaluate", source, "--against", tmp_path / "set.pack", "--size", 32, "--max-bad", 10)
    for done in (packed, trained, from_pack):
        assert done.returncode == 0, done.stderr
        assert _said(done.stdout) == expected, done.stdout
        assert f"{len(members)} at 32 px" in done.stdout and f"1 of {len(members) + 1} images are broken" in done.stderr
    assert scored.returncode == 0, scored.stderr
    for side in ("images", "against"):
        (line,) = (line for line in scored.stdout.splitlines() if line.startswith(f"  {side}"))
        assert _said(line) == expected, line
