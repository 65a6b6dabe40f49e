"""--data to a packed set: made once, remade when its source changed or the file is damaged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastbegan import UserError
from fastbegan.data.decode import Decoding
from fastbegan.data.pack import leftovers, read_journal, read_pack
from fastbegan.data.prepare import NoRoomError, cache_folder, load_catalogue, load_images, make_pack
from fastbegan.data.source import find_source
from tests.helpers.processes import environment


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What was made, chunk by chunk, in a cache of this test's own."""
    monkeypatch.setenv("FASTBEGAN_CACHE", str(tmp_path / "cache"))
    return []


def _load(data: object, made: list[str], **options: object) -> np.ndarray:
    settings: dict = {"size": 16, "decoding": Decoding(), **options}
    return load_images(str(data), progress=lambda what, done, total: made.append(what), **settings).images


def test_a_folder_is_packed_once(pictures: Path, made: list[str]) -> None:
    first = _load(pictures, made)
    assert first.shape == (12, 16, 16, 3) and first.dtype == np.uint8
    again = _load(pictures, made)
    assert made == ["packing images"]
    assert np.array_equal(first, again) and isinstance(again, np.memmap)
    _load(pictures, made, size=8)
    _load(pictures, made, decoding=Decoding("none"))
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
    assert not list(cache_folder().glob("*.pack"))
    with pytest.warns(UserWarning, match=r"broken\.jpg: cannot identify.*left out"):
        assert len(_load(pictures, made, max_bad=10.0)) == 12
    (report,) = cache_folder().glob("*.rejected.txt")
    assert "broken.jpg\tbroken: cannot identify" in report.read_text()
    with pytest.raises(UserError, match="1 of 13"):  # packed by now, and still too many for this caller
        _load(pictures, made)


def test_remarks_of_a_cached_pack_are_those_of_today(pictures: Path, made: list[str]) -> None:
    for count in (1, 2):
        (pictures / f"{count}.txt").write_text("")
        image_set = load_images(str(pictures), 16, Decoding(), lambda what, *_: made.append(what))
        assert image_set.remarks == (f"left out (.txt): {count}, such as {pictures / '1.txt'}",)
    assert len(made) == 1


@pytest.mark.parametrize(("grey", "kind"), [(0, "nearly black"), (15, "nearly black"), (16, "nearly of one colour")])
def test_a_pack_that_shows_nothing_is_told(grey: int, kind: str, tmp_path: Path, made: list[str]) -> None:
    folder = tmp_path / "faint"
    folder.mkdir()
    for number in range(40):
        pixels = np.random.default_rng(0).integers(grey - 6, grey + 1, (20, 20, 3)).clip(0)
        pixels[3] = 255 if number % 2 and number < 12 else grey  # of a few, a row is bright
        Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number:02d}.png")
    remarks = load_images(str(folder), 20, Decoding(), lambda *_: None).remarks
    assert len(remarks) == 1 and re.fullmatch(rf"{kind}: 2\d of 32 images that were looked at", remarks[0])
    plain = np.random.default_rng(0).integers(0, 40, (20, 20, 3)).astype(np.uint8)
    for path in folder.iterdir():
        Image.fromarray(plain).save(path)
    assert not load_images(str(folder), 20, Decoding(), lambda *_: None).remarks


def test_a_folder_called_faces_is_named_with_its_path(
    pictures: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures.rename(pictures.with_name("faces"))
    monkeypatch.chdir(pictures.parent)
    assert len(_load("./faces", made)) == 12
    assert len(_load("faces:20", made)) == 20


def test_what_is_no_picture_by_its_name_is_not_broken(pictures: Path, made: list[str]) -> None:
    (pictures / "README").symlink_to(pictures / "nowhere")
    assert len(_load(pictures, made)) == 12


def _one_broken(folder: Path, count: int) -> Path:
    """Pictures whose grey is their number; number 5 is broken."""
    folder.mkdir()
    for number in range(count):
        Image.fromarray(np.full((20, 20, 3), number, np.uint8)).save(folder / f"{number:02d}.png")
    (folder / "05.png").write_bytes(b"broken")
    return folder


def test_a_broken_file_counts_once_when_a_pack_is_taken_up(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbegan.data.source._CHUNK", 4)
    folder = _one_broken(tmp_path / "many", 16)

    def killed(what: str, done: int, total: int) -> None:
        if done == 12:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        load_images(str(folder), 16, Decoding(), killed, max_bad=7.0)
    (begun,) = cache_folder().glob(".*.partial")
    begun.write_bytes(begun.read_bytes()[: 4096 + 6 * 768])  # a power cut
    with pytest.warns(UserWarning, match="1 of 16 images are broken"):
        assert len(_load(folder, made, max_bad=7.0)) == 15


@pytest.mark.parametrize("data", ["faces:0", "faces:many", "portraits:-3"])
def test_wrong_counts_of_faces_are_named(data: str, made: list[str]) -> None:
    with pytest.raises(UserError, match="accepted: 'faces', 'portraits', either with :COUNT"):
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


def _quiet(*_: object) -> None:
    pass


def test_pack_at_a_place_of_ones_own(pictures: Path, tmp_path: Path, made: list[str]) -> None:
    out = tmp_path / "out" / "mine.pack"

    def pack(data: Path, size: int = 16) -> str:
        return make_pack(str(data), out, size, Decoding(), lambda what, done, total: made.append(what)).description

    assert pack(pictures).endswith("12 at 16 px, packed now")
    assert pack(pictures).endswith("12 at 16 px") and len(made) == 1
    (pictures / "02.jpg").unlink()
    with pytest.warns(UserWarning, match="was made of other files, or otherwise; packing again"):
        assert "11 at 16 px" in pack(pictures)
    with pytest.warns(UserWarning, match="packing again"):
        assert "11 at 8 px" in pack(pictures, 8)
    with pytest.raises(UserError, match=r"holds images of .*pictures; give another file for images of .*nested"):
        pack(pictures / "nested")
    assert len(_load(out, made, size=8)) == 11
    with pytest.raises(UserError, match="holds images of 8 px; 16 are wanted"):
        _load(out, made)
    out.write_bytes(b"no pack")
    with pytest.raises(UserError, match="does not start like a pack; make it again"):
        _load(out, made)
    with pytest.raises(UserError, match="does not start like a pack; give another file for images of"):
        pack(pictures)
    assert out.read_bytes() == b"no pack"


def test_too_many_broken_files_stop_early_and_are_taken_up_with_a_higher_bound(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("fastbegan.data.source._CHUNK", 4)
    folder = _one_broken(tmp_path / "many", 12)
    with pytest.raises(UserError, match=r"1 of the first 8 of 12 images are broken .*05\.png: cannot identify"):
        _load(folder, made)
    assert len(made) == 1
    with pytest.warns(UserWarning, match="1 of 12 images are broken"):
        images = _load(folder, made, max_bad=20.0)
    assert len(made) == 3  # what was packed before is there
    assert images[:, 0, 0, 0].tolist() == [n for n in range(12) if n != 5]


def test_no_room_is_said_before_anything_is_written(
    pictures: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(pictures)._replace(free=9000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)
    with pytest.raises(NoRoomError, match="would take 0 MiB, 0 MiB are free there; make room, or set FASTBEGAN_CACHE"):
        _load(pictures, made)
    assert not made and not list(cache_folder().glob("*"))


def test_a_folder_that_changes_while_it_is_packed(pictures: Path, made: list[str]) -> None:
    def progress(what: str, done: int, total: int) -> None:
        (pictures / "new.png").write_bytes((pictures / "01.png").read_bytes())

    with pytest.raises(UserError, match="changed while they were packed"):
        load_images(str(pictures), 16, Decoding(), progress)
    assert not list(cache_folder().glob("*"))


def test_what_a_pack_says_is_there_before_the_pack(
    pictures: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (pictures / "broken.jpg").write_bytes(b"no picture")
    replace = Path.replace

    def killed(path: Path, target: Path) -> Path:
        if target.suffix == ".pack":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(Path, "replace", killed)
        _load(pictures, made, max_bad=10.0)
    assert "broken.jpg" in next(cache_folder().glob("*.rejected.txt")).read_text()
    with pytest.warns(UserWarning, match="1 of 13 images are broken"):
        assert len(_load(pictures, made, max_bad=10.0)) == 12
    assert len(made) == 1  # all of it was there


def test_old_leftovers_of_other_sets_are_cleared(pictures: Path, made: list[str]) -> None:
    cache_folder().mkdir(parents=True)
    old, young = cache_folder() / ".a.pack.partial", cache_folder() / ".b.pack.journal"
    for path in (old, young):
        path.write_text("")
    os.utime(old, (1, 1))
    _load(pictures, made)
    assert not old.exists() and young.exists()


def test_catalogue_of_good_files(pictures: Path, made: list[str]) -> None:
    Image.new("RGBA", (30, 20)).save(pictures / "00.png")
    (pictures / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"1 of 14 images are broken"):
        load_catalogue(str(pictures), 16, Decoding(), _quiet)
    with pytest.warns(UserWarning, match=r"1 of 14 .*broken\.jpg: cannot identify.*fastbegan data check names all"):
        found = load_catalogue(str(pictures), 16, Decoding(), lambda what, *_: made.append(what), max_bad=10)
    names = [Path(request.path).name for request in found.entries]
    assert names[0] == "00.png" and len(names) == 13 and "broken.jpg" not in names
    assert found.seen[0].tolist() == [30, 20, 1] and (found.seen[1:] == [50, 40, 0]).all()
    assert [Path(name).name for name, _ in found.broken] == ["broken.jpg"]
    with pytest.warns(UserWarning, match="1 of 14"):
        again = load_catalogue(str(pictures), 16, Decoding(), lambda what, *_: made.append(what), max_bad=10)
    assert len(made) == 1 and np.array_equal(again.seen, found.seen) and again.entries == found.entries
    with pytest.warns(UserWarning, match="left out"):
        images = _load(pictures, [], max_bad=10.0)
    assert len(images) == 13  # the same files in the same order
    with pytest.raises(UserError, match="'faces:20' is not made of picture files"):
        load_catalogue("faces:20", 16, Decoding(), _quiet)


def test_packing_makes_the_catalogue_too(pictures: Path, made: list[str]) -> None:
    _load(pictures, made)
    found = load_catalogue(str(pictures), 16, Decoding(), lambda what, *_: made.append(what))
    assert made == ["packing images"] and len(found.entries) == 12


_PACK = """
import sys, time
from pathlib import Path
from fastbegan.data.decode import Decoding
from fastbegan.data.prepare import make_pack
source, out, log, *hang = sys.argv[1:]
def progress(what, done, total):
    with open(log, "a") as file:
        file.write(f"{what} {done}\\n")
    if hang:
        time.sleep(1000)
make_pack(source, Path(out), 16, Decoding(), progress)
"""


def _packing(*arguments: object) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", _PACK, *map(str, arguments)], env=environment())


def test_two_packs_at_once_do_the_work_once(pictures: Path, tmp_path: Path) -> None:
    out, log = tmp_path / "a.pack", tmp_path / "log"
    both = [_packing(pictures, out, log) for _ in range(2)]
    assert [one.wait(300) for one in both] == [0, 0]
    assert log.read_text().count("packing images") == 1
    assert len(read_pack(out)[0]) == 12
    assert sorted(one.name for one in tmp_path.glob(".*")) == []


@pytest.mark.slow
def test_a_killed_pack_leaves_no_half_made_set_and_is_taken_up(tmp_path: Path) -> None:
    folder, out, log = tmp_path / "many", tmp_path / "a.pack", tmp_path / "log"
    folder.mkdir()
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8))
    image.save(folder / "0000.png")
    for number in range(1, 1300):
        (folder / f"{number:04d}.png").write_bytes((folder / "0000.png").read_bytes())
    process = _packing(folder, out, log, "hang")
    while not log.exists() and process.poll() is None:
        time.sleep(0.005)
    process.kill()
    process.wait()
    assert not out.exists() and leftovers(out)[0].exists()
    made_from = find_source(str(folder)).made_from(Decoding())
    before = read_journal(leftovers(out)[1], made_from)[-1].done
    log.unlink()
    assert _packing(folder, out, log).wait(300) == 0
    counts = [int(line.split()[-1]) for line in log.read_text().splitlines()]
    assert before >= 512 and counts == [count for count in (512, 1024, 1300) if count > before]  # nothing twice
    images = read_pack(out)[0]
    assert len(images) == 1300 and (images == images[0]).all()
    assert not list(tmp_path.glob(".*"))
