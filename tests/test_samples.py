"""Pictures: geometry of sheets, strips and animations."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastbegan import PRESETS
from fastbegan.cli import main
from fastbegan.commands.sample import DEMO
from fastbegan.data.faces import faces
from fastbegan.runs.appearance import compare, diversity, roughness
from fastbegan.runs.curves import save_curves
from fastbegan.runs.folder import RunFolder
from fastbegan.runs.sheets import (
    banded_sheet,
    generated_band,
    grid,
    interpolate_latents,
    save_gif,
    save_png,
    sheet_latents,
    to_uint8,
)


def test_values_are_clipped_and_rounded() -> None:
    images = torch.tensor([-2.0, -1.0, 0.0, 1.0, 3.0]).view(5, 1, 1, 1).expand(5, 3, 2, 2)
    assert to_uint8(images)[:, 0, 0, 0].tolist() == [0, 0, 128, 255, 255]


def test_grid_places_tiles_row_by_row() -> None:
    tiles = np.arange(5, dtype=np.uint8)[:, None, None, None].repeat(64, 1).repeat(64, 2).repeat(3, 3)
    picture = grid(tiles, 3)
    assert picture.shape == (128, 192, 3)
    assert picture[0, 0, 0] == 0 and picture[0, 191, 0] == 2 and picture[127, 64, 0] == 4
    assert picture[127, 191, 0] == 255  # no sixth tile
    assert grid(tiles[:, :16, :16], 3).shape == (128, 192, 3)  # small ones are enlarged


def test_generated_band_is_cut_out_exactly() -> None:
    generator = np.random.default_rng(0)
    bands = [generator.integers(0, 256, (20, 32, 32, 3), np.uint8) for _ in range(4)]
    sheet = banded_sheet(bands)
    assert np.array_equal(np.asarray(generated_band(sheet)), grid(bands[2], 10))


def test_animation(tmp_path: Path) -> None:
    frames = [np.full((16, 16, 3), value, np.uint8) for value in (0, 100, 200)]
    save_gif(tmp_path / "a.gif", frames, 80)
    with Image.open(tmp_path / "a.gif") as image:
        assert getattr(image, "n_frames", 1) == 3
        image.seek(2)
        assert image.convert("RGB").getpixel((8, 8)) == (200, 200, 200)


def test_png_round_trip(tmp_path: Path) -> None:
    picture = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    save_png(tmp_path / "a.png", picture)
    assert np.array_equal(np.asarray(Image.open(tmp_path / "a.png")), picture)


def test_interpolation_ends_at_the_latents() -> None:
    z = sheet_latents(8, 0, 3)
    ways = interpolate_latents(z, 5)
    assert ways.shape == (2, 5, 8)
    assert torch.equal(ways[0, 0], z[0]) and torch.equal(ways[0, -1], z[1]) and torch.equal(ways[1, -1], z[2])
    torch.testing.assert_close(ways[0, 2], (z[0] + z[1]) / 2)


def test_first_latents_do_not_depend_on_how_many() -> None:
    assert torch.equal(sheet_latents(8, 1, 3), sheet_latents(8, 1, 10)[:3])
    assert not torch.equal(sheet_latents(8, 1, 3), sheet_latents(8, 2, 3))


def test_there_is_a_generator_before_any_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert sum(path.stat().st_size for path in DEMO.iterdir()) < 2**20
    monkeypatch.chdir(tmp_path)
    assert main(["sample", "--count", "16", "--device", "cpu"]) == 0
    with Image.open(tmp_path / "generated" / "sheet-0.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    assert pixels.shape == (128, 512, 3)
    run = RunFolder(DEMO)
    config, preset = run.read_config(), PRESETS["demo-64"]
    assert f"fastbegan train --preset {config.preset} --out runs/demo-64" in (DEMO / "README.md").read_text()
    assert config.model == preset.model
    chosen = {name: getattr(config.train, name) for name in ("precision", "passes")}  # by measurement, on a CPU
    assert config.train == replace(preset.train, **chosen)
    z = sheet_latents(config.model.latent, 0, 64)
    with torch.no_grad():
        images = run.load_generator()(z)
    real = torch.from_numpy(faces(torch.arange(64), 64).numpy()).permute(0, 3, 1, 2).float() / 127.5 - 1
    looks = compare(images, real)
    assert looks.variety > 0.4 and 0.7 < looks.sharpness < 1.2
    assert (images.mean(0) - real.mean(0)).abs().mean() < 0.25


def test_diversity_by_hand() -> None:
    images = torch.tensor([0.0, 0.5, 1.0]).view(3, 1, 1, 1).expand(3, 3, 2, 2)
    assert abs(diversity(images) - (0.5 + 1.0 + 0.5) / 3) < 1e-6
    assert diversity(images[:1]) == 0 and diversity(images[:1].expand(4, 3, 2, 2)) == 0


def test_sharpness_and_variety_by_hand() -> None:
    """Two real images of columns 0, 1, 0; samples with half of that contrast and a third of that distance."""
    columns = torch.tensor([0.0, 1.0, 0.0]).expand(1, 3, 2, 3)
    real = torch.cat((columns, columns - 0.9))
    samples = torch.cat((columns / 2, columns / 2 - 0.3))
    found = compare(samples, real)
    assert found.diversity == pytest.approx(0.3) and found.variety == pytest.approx(1 / 3)
    assert roughness(real) == pytest.approx(1) and found.sharpness == pytest.approx(0.5)
    assert roughness(columns.transpose(2, 3)) == pytest.approx(1)  # along columns too
    flat = compare(samples, real[:1].mean().expand(4, 3, 2, 3))
    assert (flat.sharpness, flat.variety) == (0, 0)


def test_curves(tmp_path: Path) -> None:
    names = ("convergence", "loss_real", "loss_fake", "k")
    rows = [{"images": 100 * i, **{name: n + 1 / i for n, name in enumerate(names)}} for i in range(1, 20)]
    save_curves(tmp_path / "c.png", rows, "title")
    colours = np.unique(np.asarray(Image.open(tmp_path / "c.png").convert("RGB")).reshape(-1, 3), axis=0)
    assert {(214, 39, 40), (31, 119, 180), (44, 160, 44)} <= {tuple(c) for c in colours.tolist()}
    save_curves(tmp_path / "none.png", [], "title")
    assert not (tmp_path / "none.png").exists()
