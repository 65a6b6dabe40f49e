"""`fastbegan data`: what people see of it, on the files that they really have."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from subprocess import CompletedProcess

import numpy as np
import pytest
from PIL import Image

from fastbegan.data import dali_loader
from fastbegan.data.pack import read_pack
from fastbegan.runs.folder import RunFolder
from tests.helpers import zoo

Run = Callable[..., "CompletedProcess[str]"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The whole zoo and sixteen plain pictures."""
    place = tmp_path / "zoo"
    place.mkdir()
    zoo.broken(place)
    zoo.converted(place)
    for number in range(16):
        Image.new("RGB", (20, 20), (number, number, number)).save(place / f"plain{number:02d}.png")
    (place / "notes.txt").write_text("notes")
    return place


def test_check_names_every_broken_file(folder: Path, fastbegan: Run) -> None:
    done = fastbegan("data", "check", folder)
    assert done.returncode == 1, done.stderr
    named = {line.split(": ")[0].rpartition("/")[2]: line for line in done.stdout.splitlines() if line[:6] == "broken"}
    assert set(named) == set(zoo.BROKEN)
    for name, reason in zoo.BROKEN.items():
        assert any(words in named[name] for words in reason.split("|")), named[name]
    assert (
        f"{len(zoo.BROKEN)} broken\n" in done.stdout
        and f"converted (rotated, or of another mode than 8-bit RGB or grey): {len(zoo.CONVERTED)}," in done.stdout
    )
    for name in zoo.BROKEN:
        (folder / name).unlink()
    again = fastbegan("data", "check", folder)
    assert again.returncode == 0 and "21 of 21 good, 0 broken" in again.stdout


def test_pack_refuses_many_broken_files_and_leaves_few_out(folder: Path, tmp_path: Path, fastbegan: Run) -> None:
    out = tmp_path / "zoo.pack"
    refused = fastbegan("data", "pack", folder, out, "--size", 8)
    assert refused.returncode == 2 and not out.exists()
    assert "max_bad accepts 1 percent" in refused.stderr and "Traceback" not in refused.stderr
    done = fastbegan("data", "pack", folder, out, "--size", 8, "--max-bad", 40)
    assert done.returncode == 0, done.stderr
    assert "21 at 8 px, packed now\n" in done.stdout and "8-bit RGB or grey): 5," in done.stdout
    report = out.with_suffix(".rejected.txt").read_text()
    for name in zoo.BROKEN:
        assert f"/{name}\tbroken: " in report
    for name in zoo.CONVERTED:
        assert f"/{name}\tconverted" in report
    assert "notes.txt\tleft out: .txt\n" in report
    images = read_pack(out)[0]
    names = sorted([*zoo.CONVERTED, *(f"plain{number:02d}.png" for number in range(16))])
    for name, colour in zoo.CONVERTED.items():
        found = images[names.index(name)].reshape(-1, 3)
        assert np.abs(found.astype(int) - colour).max() <= 2, name
    again = fastbegan("data", "pack", folder, out, "--size", 8, "--max-bad", 40)
    assert again.returncode == 0 and "packed now" not in again.stdout


def test_links_lead_to_each_picture_once(tmp_path: Path, fastbegan: Run) -> None:
    place = tmp_path / "links"
    place.mkdir()
    count = zoo.links(place)
    done = fastbegan("data", "check", place)
    assert done.returncode == 0 and f"{count} of {count} good" in done.stdout, done.stdout + done.stderr


def test_training_on_a_packed_zoo_meets_no_bad_image(folder: Path, tmp_path: Path, fastbegan: Run) -> None:
    out = tmp_path / "zoo.pack"
    assert fastbegan("data", "pack", folder, out, "--size", 32, "--max-bad", 40).returncode == 0
    options = ("--size", 32, "--filters", 4, "--steps", 4, "--batch-size", 8, "--data", out)
    done = fastbegan("train", *options, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "loader packed: no GPU" in done.stdout


@pytest.mark.slow
def test_a_run_goes_on_with_another_loader(pictures: Path, tmp_path: Path, fastbegan: Run) -> None:
    flags = ("--filters", 4, "--batch-size", 4, "--data", pictures, "--jitter", 1, "--out", tmp_path / "run")
    kinds = ("packed", "torch", *(("dali",) if dali_loader.INSTALLED else ()), "resident")
    for number, kind in enumerate(kinds, 1):
        done = fastbegan("train", *flags, "--loader", kind, "--steps", 3 * number, "--log-every", 1)
        assert done.returncode == 0, done.stderr
        assert f"loader {kind}" in done.stdout and "% waiting for data" in done.stdout
        assert number == 1 or f"continued at step {3 * (number - 1)}" in done.stdout
    rows = RunFolder(tmp_path / "run").read_metrics()
    assert [row["step"] for row in rows] == list(range(1, 3 * len(kinds) + 1))
    assert all(0 <= row["data_wait"] <= 1 for row in rows)
    content = (pictures / "02.jpg").read_bytes()
    (pictures / "02.jpg").write_bytes(content + b"\0")  # as many files, another one
    for kind in ("torch", "packed"):
        other = fastbegan("train", *flags, "--loader", kind, "--steps", 100)
        assert other.returncode == 2 and "is not what" in other.stderr, other.stderr


def test_an_empty_folder_is_no_pack(tmp_path: Path, fastbegan: Run) -> None:
    (tmp_path / "empty").mkdir()
    done = fastbegan("data", "pack", tmp_path / "empty", tmp_path / "x.pack")
    assert done.returncode == 2 and "has no images" in done.stderr and not (tmp_path / "x.pack").exists()


def test_names_that_are_no_text(tmp_path: Path, fastbegan: Run) -> None:
    (tmp_path / os.fsdecode(b"bad\xff.jpg")).write_bytes(b"no picture")
    done = fastbegan("data", "check", tmp_path)
    assert done.returncode == 1 and "cannot identify image file" in done.stdout and "BytesIO" not in done.stdout


def test_info_draws_a_contact_sheet(folder: Path, tmp_path: Path, fastbegan: Run) -> None:
    out = tmp_path / "faces.pack"
    assert fastbegan("data", "pack", "faces:100", out, "--size", 16).returncode == 0
    done = fastbegan("data", "info", out)
    assert done.returncode == 0 and "100 procedural faces: 100 images of 16 px, 0.1 MB" in done.stdout
    with Image.open(tmp_path / "faces.sheet.png") as sheet:
        assert sheet.size == (128, 128)
    fastbegan("data", "info", out, "--sheet", tmp_path / "other.png")
    assert (tmp_path / "other.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("pack", "faces:4", "out.npz"), "out is out.npz; accepted: a name that ends with .pack"),
        (("pack", "faces:4", "out.pack", "--size", "0"), "size is 0; accepted: whole numbers from 1"),
        (("pack", "nowhere", "out.pack"), "'nowhere' does not exist; accepted: 'faces'"),
        (("pack", "faces:4", "out.pack", "--crop", "left"), "crop is 'left'; accepted: center"),
        (("pack", "faces:4", "out.pack", "--workers", "-1"), "workers is -1; accepted: whole numbers from 1"),
        (("pack", "faces:4", "out.pack", "--max-bad", "nan"), "max_bad is nan; accepted: 0 to 100"),
        (("check", "nowhere", "--workers", "0"), "workers is 0; accepted: whole numbers from 1"),
        (("check", "faces:4"), "'faces:4' is not made of picture files"),
        (("info", "nowhere.pack"), "nowhere.pack does not exist; accepted: a .pack file"),
        (("info", "."), ". is no file"),
    ],
)
def test_bad_input_is_named(arguments: tuple[str, ...], message: str, fastbegan: Run) -> None:
    done = fastbegan("data", *arguments)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not Path("out.pack").exists()
