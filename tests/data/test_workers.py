"""Processes that decode: answers in order, a crash or a hang costs one file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastbegan import UserError
from fastbegan.data import worker, workers
from fastbegan.data.decode import MAX_PIXELS, Decoding, RejectedImageError, decode, read_bytes
from fastbegan.data.scale import scale
from fastbegan.data.workers import Entry, Scaled, decode_all
from tests.helpers import profiles, zoo
from tests.helpers.processes import environment


def _entry(path: Path) -> Entry:
    return Entry(str(path), str(path))


@pytest.mark.parametrize("count", [1, 2])
def test_answers_are_in_order_and_as_decoded_here(pictures: Path, count: int) -> None:
    (pictures / "05.png").write_bytes(b"broken")
    paths = sorted(path for path in pictures.rglob("*.*") if path.is_file())
    found = list(decode_all(map(_entry, paths), 16, Decoding(), workers=count))
    assert [request.path for request, _ in found] == [str(path) for path in paths]
    for request, answer in found:
        if request.path.endswith("05.png"):
            assert isinstance(answer, RejectedImageError) and "cannot identify" in str(answer)
        else:
            (expected,) = scale([decode(read_bytes(request.path), Decoding()).pixels], 16)
            assert isinstance(answer, Scaled) and np.array_equal(answer.pixels, expected)
            assert (answer.height, answer.width, answer.notes) == (40, 50, 0)


def test_stopping_early_leaves_no_process(pictures: Path) -> None:
    answers = decode_all([_entry(pictures / "02.jpg")] * 100, 16, Decoding(), workers=2)
    next(answers)
    answers.close()
    children = Path(f"/proc/self/task/{os.getpid()}/children")
    if children.exists():
        for child in children.read_text().split():
            assert "fastbegan.data.worker" not in Path(f"/proc/{child}/cmdline").read_text()


_HOSTILE = """
import os, time
from fastbegan.data import decode
real = decode.read_bytes
def read_bytes(path, *more):
    if os.path.basename(path).startswith("crash"):
        os.kill(os.getpid(), 11)
    if os.path.basename(path) == "hang.jpg":
        time.sleep(60)
    return real(path, *more)
decode.read_bytes = read_bytes
"""


def test_a_crash_and_a_hang_cost_one_file_each(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sitecustomize.py").write_text(_HOSTILE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(workers, "_SECONDS", 2.0)
    names = "02.jpg crash.jpg 04.jpg hang.jpg 08.jpg 01.png crash2.jpg 07.png 10.jpg 05.png".split()
    for name in ("crash.jpg", "hang.jpg", "crash2.jpg"):
        (pictures / name).write_bytes((pictures / "02.jpg").read_bytes())
    found = list(decode_all((_entry(pictures / name) for name in names), 16, Decoding(), workers=1))
    reasons = {Path(r.path).name: str(a) for r, a in found if isinstance(a, RejectedImageError)}
    assert reasons == {
        "crash.jpg": "its decoder crashed (-11)",
        "crash2.jpg": "its decoder crashed (-11)",
        "hang.jpg": "took more than 2 seconds",
    }


def test_a_process_that_is_ended_from_outside_costs_nothing(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    once = _HOSTILE.replace(
        "os.kill(os.getpid(), 11)",
        f"""
        try:
            os.mkdir({str(tmp_path / "done")!r})
        except FileExistsError:
            pass
        else:
            os.kill(os.getpid(), 9)""",
    )
    (tmp_path / "sitecustomize.py").write_text(once)
    monkeypatch.syspath_prepend(tmp_path)
    (pictures / "crash.jpg").write_bytes((pictures / "02.jpg").read_bytes())
    requests = [_entry(pictures / name) for name in ("02.jpg", "crash.jpg", "04.jpg")]
    assert all(isinstance(answer, Scaled) for _, answer in decode_all(requests, 16, Decoding(), workers=1))
    assert (tmp_path / "done").exists()


_PEAK = """
import sys
import torch
from fastbegan.data.decode import Decoding
from fastbegan.data.workers import Entry, decode_all
from tests.helpers.processes import peak_memory
before = peak_memory()
for request, answer in decode_all([Entry(path, path) for path in sys.argv[1:]], 16, Decoding("none"), workers=1):
    print(answer if isinstance(answer, Exception) else "")
print(peak_memory() - before, torch.get_num_threads())
"""


def _growth(*pictures: Path) -> tuple[int, list[str]]:
    """Bytes that a process needs more for having these decoded, and what it says of each."""
    command = [sys.executable, "-c", _PEAK, *map(str, pictures)]
    variables = {**environment(), "OMP_NUM_THREADS": "2"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True, check=True, timeout=300)
    *answers, last = done.stdout.splitlines()
    bytes_more, threads = map(int, last.split())
    assert threads == 2  # what the pool's threads are told is for them alone
    return bytes_more, answers


@pytest.mark.slow
def test_many_large_pictures_are_not_held_at_once(tmp_path: Path) -> None:
    Image.new("RGB", (4000, 3000), (40, 160, 90)).save(tmp_path / "large.jpg")
    bytes_more, answers = _growth(*[tmp_path / "large.jpg"] * 32)
    assert answers == [""] * 32
    assert bytes_more < 250e6  # one of them is 36 MB, all are 1.2 GB


def test_processes_that_do_not_start_are_no_broken_files(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "PIL.py").write_text("raise ImportError")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="decoder processes do not start here: ImportError"):
        list(decode_all([_entry(pictures / "02.jpg")], 16, Decoding(), workers=1))


def test_memory_is_bounded(pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A picture that takes more memory than a process may have is named, and the next one decoded."""
    (tmp_path / "sitecustomize.py").write_text(
        """
from fastbegan.data import decode
real = decode._upright
def upright(data, limit):
    if data == b"greedy":
        bytearray(1 << 29)
        bytearray(1 << 30)
    return real(data, limit)
decode._upright = upright
"""
    )
    monkeypatch.syspath_prepend(tmp_path)
    entries = [Entry("greedy", data=b"greedy"), _entry(pictures / "02.jpg")]
    for limit, reason in ((1_000_000, "needs more memory than one picture may have"), (50_000_000, "cannot identify")):
        (_, greedy), (_, small) = decode_all(entries, 8, Decoding("none", limit), workers=1)
        assert isinstance(greedy, RejectedImageError) and reason in str(greedy)
        assert isinstance(small, Scaled)
    assert worker.MEMORY + worker.PIXEL * MAX_PIXELS < 2.5e9


@pytest.mark.slow
def test_bombs_cost_no_memory(tmp_path: Path) -> None:
    zoo.broken(tmp_path)
    names = ["bomb.png", "bomb.jpg"]
    bytes_more, answers = _growth(*(tmp_path / name for name in names))
    for name, answer in zip(names, answers, strict=True):
        assert any(words in answer for words in zoo.BROKEN[name].split("|")), answer
    assert bytes_more < 250e6


_EXIF = Image.Exif()
_EXIF[0x0112] = 6
_P3 = profiles.P3.profile()
LARGEST: dict[str, tuple[str, str, dict[str, Any]]] = {
    "plain": ("RGB", "jpg", {}),
    "turned": ("RGB", "jpg", {"exif": _EXIF}),
    "wide": ("RGB", "jpg", {"icc_profile": _P3}),
    "wide and turned": ("RGB", "jpg", {"icc_profile": _P3, "exif": _EXIF}),
    "CMYK": ("CMYK", "jpg", {}),
    "PNG": ("RGB", "png", {"icc_profile": _P3}),
    "alpha": ("RGBA", "png", {"icc_profile": _P3, "exif": _EXIF}),
    "palette": ("P", "png", {"transparency": 0}),
    "sixteen": ("I;16", "png", {"transparency": 0}),
    "float": ("F", "tif", {}),
    "WebP": ("RGBA", "webp", {"lossless": True, "method": 0}),
}


@pytest.mark.slow
@pytest.mark.parametrize("megapixels", [4, 64])
@pytest.mark.parametrize("kind", LARGEST)
def test_the_largest_picture_fits_into_the_memory_of_a_process(kind: str, megapixels: int, tmp_path: Path) -> None:
    mode, suffix, options = LARGEST[kind]
    path = tmp_path / f"large.{suffix}"
    side = int((megapixels * 1e6) ** 0.5)
    Image.new(mode, (side, side)).save(path, **options)
    ((_, answer),) = decode_all([_entry(path)], 8, Decoding("none", side * side), workers=1)
    assert isinstance(answer, Scaled), answer
