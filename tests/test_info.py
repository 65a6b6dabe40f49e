"""The table of presets, and that the page on the start shows it as it is."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastbegan import PRESETS, ModelConfig, TrainConfig
from fastbegan.cli import main
from fastbegan.commands.info import preset_markdown
from fastbegan.measure.step import configured
from fastbegan.nets.models import build
from fastbegan.training.cost import step_cost
from tests.helpers.processes import ROOT, TINY


def test_cost_of_a_step_that_can_be_worked_out() -> None:
    # 8x8, n = 1, one conv a level: counted by hand, multiply-adds in a forward of one image
    config = ModelConfig(size=8, filters=1, hidden=2, latent=3, widths=(1,), repeats=1)
    generator = 3 * 64 + 9 * 64 + 9 * 3 * 64
    encoder = 9 * 3 * 64 + 9 * 64 + 64 * 2
    decoder = 2 * 64 + 9 * 64 + 9 * 3 * 64
    auto_encoder = encoder + decoder
    # G forward, weight and input gradients (but of z); D of G(z): three of each; D of x: no gradient for x
    expected = generator * 3 - 3 * 64 + auto_encoder * 3 + auto_encoder * 3 - 9 * 3 * 64
    cost = step_cost(config, TrainConfig(batch_size=4))
    assert cost.flops == 2 * 4 * expected
    assert cost.parameters == sum(p.numel() for net in build(config, seed=0) for p in net.parameters())


def test_cost_of_the_other_ways_to_do_that_step() -> None:
    config = ModelConfig(size=8, filters=1, hidden=2, latent=3, widths=(1,), repeats=1)
    generator, stem = 3 * 64 + 9 * 64 + 9 * 3 * 64, 9 * 3 * 64
    auto_encoder = stem + 9 * 64 + 64 * 2 + 2 * 64 + 9 * 64 + 9 * 3 * 64
    both, images = 2 * (3 * auto_encoder - stem), generator * 3 - 3 * 64
    # D: G forward, D of x and of G(z); then G with D's input gradients but none of its weights
    apart = generator + both + images + 2 * auto_encoder
    joined = images + 2 * 3 * auto_encoder  # one batch: the gradient at the images is of both halves
    costs = {"joint": joined, "alternating": apart, "textbook": both + images + 2 * auto_encoder}
    for mode, expected in costs.items():
        train = configured(TrainConfig(batch_size=4), mode)
        assert step_cost(config, train).flops == 2 * 4 * expected, mode


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_what_is_kept_is_the_passes_that_are_alive_together(dtype: torch.dtype | None) -> None:
    model = ModelConfig(size=32, filters=8)
    trains = {how: configured(TrainConfig(), how) for how in ("single-pass", "joint", "textbook")}
    kept = {how: step_cost(model, train, dtype).kept for how, train in trains.items()}
    assert kept["single-pass"] < kept["joint"] < 2 * kept["single-pass"] < kept["textbook"]
    for how, full in kept.items():
        assert step_cost(model, replace(trains[how], batch_size=3), dtype).kept == pytest.approx(full, rel=0.02)
    half = step_cost(model, TrainConfig(), torch.bfloat16).kept
    assert half == pytest.approx(step_cost(model, TrainConfig()).kept / 2, rel=0.02)


@pytest.mark.parametrize(("size", "share"), [(32, 0.59), (64, 0.56), (128, 0.51), (256, 0.49)])
@pytest.mark.parametrize("passes", ["single-pass", "joint"])
def test_a_step_does_less_than_the_textbook(size: int, share: float, passes: str) -> None:
    """The README's figures, each to two digits."""
    preset = PRESETS[f"paper-{size}"]
    assert preset.model.filters == 128
    textbook, fast = (step_cost(preset.model, replace(preset.train, passes=how)).flops for how in ("textbook", passes))
    assert round(fast / textbook, 2) == share


def test_memory_grows_with_the_batch() -> None:
    model = PRESETS["demo"].model
    one, two = (step_cost(model, TrainConfig(batch_size=b)).memory for b in (16, 32))
    assert one < two < 2 * one


def test_the_page_shows_the_presets_as_they_are(capsys) -> None:
    text = (ROOT / "docs" / "start.md").read_text()
    shown = text.partition("<!-- presets: made by `fastbegan info --markdown` -->\n")[2].partition("<!-- end")[0]
    assert shown == preset_markdown()
    assert main(["info", "--markdown"]) == 0
    assert capsys.readouterr().out == shown


def test_readme_shows_the_two_commands_and_the_picture() -> None:
    lines = (ROOT / "README.md").read_text().splitlines()
    train, test = (
        next(n for n, line in enumerate(lines) if line.startswith(name)) for name in ("make train", "make test")
    )
    assert train < test < 32  # on the first screen
    assert (ROOT / "docs" / "demo.png").stat().st_size > 20_000


def test_damaged_metrics_are_one_clear_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", *TINY, "--steps", "2", "--device", "cpu", "--out", str(tmp_path / "run")]) == 0
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, }\n')
    capsys.readouterr()
    assert main(["info", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err
    assert "metrics.jsonl is damaged" in error and error.count("\n") == 1
