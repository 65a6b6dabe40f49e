"""`fastbegan bench step` and `doctor --preset`: what they print, and that nothing wrong is timed."""

from __future__ import annotations

import json

import pytest
import torch

from fastbegan import ModelConfig, TrainConfig, UserError, capacity
from fastbegan.bench import step as bench
from fastbegan.cli import main
from fastbegan.objective import OBJECTIVES, SinglePass

SMALL = ["bench", "step", "--filters", "2", "--batch-size", "2", "--rounds", "2", "--device", "cpu"]


def test_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--modes", "textbook,single-pass,joint,alternating", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["device"].startswith("cpu") and found["batch_size"] == 2
    rows = {row["mode"]: row for row in found["rows"]}
    assert list(rows) == ["textbook", "single-pass", "joint", "alternating"]
    for row in rows.values():
        assert row["precision"] == "float32" and row["ms"] > 0 and row["peak_bytes"] > 0
        assert row["images_per_second"] == pytest.approx(2e3 / row["ms"])
        assert row["ratio_eager"] > 0 and (row["ratio_eager"] == 1) == (row["mode"] == "textbook")
        assert row["ratio_compile"] is None
    assert rows["single-pass"]["flops"] < rows["alternating"]["flops"] < rows["textbook"]["flops"]


def test_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--modes", "textbook,single-pass+compile,joint", "--compile", "off"]) == 0
    printed = capsys.readouterr().out
    assert "one step, 32 px, n = 2, batch 2; cpu" in printed and "joint" in printed
    assert "single-pass+compile" not in printed


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--modes", "fast"], "mode is 'fast'; accepted: textbook, single-pass, joint, alternating, each also with"),
        (["--precision", "int8"], "precision is 'int8'; accepted: auto, float32"),
        (["--preset", "big"], "preset is 'big'; accepted: demo"),
        (["--rounds", "0"], "rounds is 0; accepted: whole numbers from 1"),
    ],
)
def test_bad_input(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")


def test_wrong_gradients_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    class Wrong(SinglePass):
        def shared(self, real: torch.Tensor, z: torch.Tensor, k: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return super().shared(real, z, 1.5 * k)

    monkeypatch.setitem(OBJECTIVES, "single-pass", Wrong)
    model, train = ModelConfig(size=32, filters=2), TrainConfig(batch_size=2)
    with pytest.raises(UserError, match=r"single-pass in float32 has gradients 0.\d+ from the textbook's; not timed"):
        bench.measure(model, train, ["single-pass"], ["float32"], torch.device("cpu"), None, 1)


def test_doctor_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--preset", "paper-64", "--device", "cpu", "--precision", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "840.4 GFLOPs at batch 16" in printed and "18.0 MiB an image" in printed
    assert printed.count("worked out from free memory") == 2
    assert main(["doctor", "--preset", "big"]) == 2


@pytest.mark.parametrize("guess", [0, 1, 7, 100, 1000])
@pytest.mark.parametrize("most", [0, 1, 5, 90, 100, 333])
def test_the_search_for_the_largest_batch(most: int, guess: int) -> None:
    tried: list[int] = []

    def fits(batch: int) -> bool:
        tried.append(batch)
        return batch <= most

    found = capacity._search(fits, guess)
    assert found <= most and found >= most * 7 // 8
    assert len(tried) < 80
