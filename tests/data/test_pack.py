"""The packed file: whole or not there, taken up again after a kill."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from fastbegan.data.pack import DamagedPackError, Line, Part, leftovers, read_journal, read_pack, write_pack

IMAGES = np.random.default_rng(0).integers(0, 256, (10, 4, 4, 3), np.uint8)


def _parts(start: int, *, stop: int = 10, end: BaseException | None = None) -> Iterator[Part]:
    for first in range(start, stop, 2):
        yield Part(first + 2, IMAGES[first : first + 2], [(first, 4, 4, False)], [(f"bad {first}", "why")])
    if end is not None:
        raise end


def _write(path: Path, parts=_parts, made_from: str = "hash") -> list[Line]:
    found: list[Line] = []

    def before(lines: list[Line]) -> None:
        assert not path.exists()
        found.extend(lines)

    write_pack(path, parts, size=4, source="test", made_from=made_from, before=before)
    return found


def test_round_trip(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    lines = _write(path)
    assert [line.done for line in lines] == [2, 4, 6, 8, 10] and lines[-1].broken == [("bad 8", "why")]
    images, header = read_pack(path)
    assert np.array_equal(images, IMAGES) and isinstance(images, np.memmap)
    assert (header.count, header.size, header.source, header.made_from) == (10, 4, "test", "hash")
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.pack"]


def test_damage_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    _write(path)
    content = path.read_bytes()
    for damaged, reason in (
        (content[:-1], "its header says"),
        (content[:100], "unreadable header|its header says"),
        (b"x" + content[1:], "does not start like a pack"),
        (content[:-1] + bytes([content[-1] ^ 1]), "checksum"),
        (content.replace(b'"count": 10', b'"count": -1'), "unreadable header"),
        (content.replace(b'"size": 4', b'"size": 0'), "unreadable header"),
        (content.replace(b'"size": 4', b'"size": []', 1), "unreadable header"),
    ):
        path.write_bytes(damaged)
        with pytest.raises(DamagedPackError, match=reason):
            read_pack(path)


@pytest.mark.parametrize("cut", ["between", "pixels", "journal"])
def test_what_was_written_is_taken_up_again(tmp_path: Path, cut: str) -> None:
    path, started = tmp_path / "a.pack", []
    with pytest.raises(KeyboardInterrupt):
        _write(path, lambda start: _parts(start, stop=6, end=KeyboardInterrupt()))
    assert not path.exists()
    partial, journal = leftovers(path)
    assert len(read_journal(journal, "hash")) == 3 and not read_journal(journal, "another hash")
    if cut == "pixels":  # more was written than the journal says
        partial.write_bytes(partial.read_bytes() + b"half an image")
    if cut == "journal":
        journal.write_text(journal.read_text()[:-5])

    def parts(start: int) -> Iterator[Part]:
        started.append(start)
        return _parts(start)

    lines = _write(path, parts)
    assert started == [4 if cut == "journal" else 6]
    assert np.array_equal(read_pack(path)[0], IMAGES)
    assert [line.done for line in lines] == [2, 4, 6, 8, 10] and len(lines[0].broken) == 1
    assert sorted(one.name for one in tmp_path.iterdir()) == ["a.pack"]


@pytest.mark.parametrize("change", ["source", "pixels", "lost"])
def test_what_is_not_of_this_source_or_damaged_is_not_taken_up(tmp_path: Path, change: str) -> None:
    path, started = tmp_path / "a.pack", []
    with pytest.raises(KeyboardInterrupt):
        _write(path, lambda start: _parts(start, stop=6, end=KeyboardInterrupt()))
    partial, _ = leftovers(path)
    if (
        change == "pixels"
    ):  # a power cut after the journal: nothing before the damage may be lost, nothing after it kept
        content = bytearray(partial.read_bytes())
        content[4096 + 3 * 48] ^= 1
        partial.write_bytes(content)
    if change == "lost":
        partial.unlink()

    def parts(start: int) -> Iterator[Part]:
        started.append(start)
        return _parts(start)

    _write(path, parts, "another hash" if change == "source" else "hash")
    assert started == [2 if change == "pixels" else 0]
    assert np.array_equal(read_pack(path)[0], IMAGES)


def test_wrong_chunks_are_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pixels are uint8 \(2, 5, 5, 3\); accepted: uint8 \[n, 4, 4, 3\]"):
        _write(tmp_path / "a.pack", lambda start: [Part(2, np.zeros((2, 5, 5, 3), np.uint8), [], [])])


def test_an_empty_pack(tmp_path: Path) -> None:
    _write(tmp_path / "a.pack", lambda start: [])
    assert read_pack(tmp_path / "a.pack")[0].shape == (0, 4, 4, 3)


def test_packs_of_the_first_version_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.pack"
    _write(path)
    start = path.read_bytes()[:4096]
    mark, _, header = start.rstrip().partition(b"\n")
    values = json.loads(header)
    del values["made_from"]
    old = (mark + b"\n" + json.dumps(values).encode()).ljust(4095) + b"\n"
    path.write_bytes(old + path.read_bytes()[4096:])
    assert read_pack(path)[1].made_from == ""
