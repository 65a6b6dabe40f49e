"""`fastbegan bench step` and `doctor --preset`: what they print, and that nothing wrong is timed."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from fastbegan import ModelConfig, TrainConfig, UserError
from fastbegan.cli import main
from fastbegan.measure import step as bench
from fastbegan.training import capacity, objective
from fastbegan.training.objective import OBJECTIVES, SinglePass

SMALL = ["bench", "step", "--filters", "2", "--batch-size", "2", "--rounds", "2", "--device", "cpu"]


def test_json_alone(capsys: pytest.CaptureFixture[str]) -> None:
    # float32 also on a CPU that has bf16, which `auto` takes
    modes = "textbook,single-pass,joint,alternating"
    assert main([*SMALL, "--precision", "float32", "--modes", modes, "--json"]) == 0
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


@pytest.mark.parametrize("place", ["check", "prepare"])
@pytest.mark.filterwarnings("always")
def test_a_mode_that_does_not_fit_is_left_out(
    place: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = getattr(bench, place)

    def short(*given: Any) -> Any:
        if "joint" in str(given[2]):
            raise torch.OutOfMemoryError("CUDA out of memory")
        return real(*given)

    monkeypatch.setattr(bench, place, short)
    assert main([*SMALL, "--modes", "joint,single-pass", "--precision", "float32", "--json"]) == 0
    told = capsys.readouterr()
    assert [row["mode"] for row in json.loads(told.out)["rows"]] == ["single-pass"]
    assert "joint in float32 does not fit into memory and is left out" in told.err


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
        def for_both(
            self, real: torch.Tensor, z_d: torch.Tensor, z_g: torch.Tensor
        ) -> tuple[torch.Tensor, torch.Tensor]:
            self.k = 1.5 * self.k
            return super().for_both(real, z_d, z_g)

    monkeypatch.setitem(OBJECTIVES, "single-pass", Wrong)
    model, train = ModelConfig(size=32, filters=2), TrainConfig(batch_size=2)
    with pytest.raises(UserError, match=r"single-pass in float32 has gradients 0.\d+ from the textbook's; not timed"):
        bench.measure(model, train, ["single-pass"], ["float32"], torch.device("cpu"), None, 1)


def test_half_precision_is_timed_too(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*SMALL, "--modes", "textbook,single-pass", "--precision", "bf16", "--json"]) == 0
    assert [row["precision"] for row in json.loads(capsys.readouterr().out)["rows"]] == ["bf16", "bf16"]
    model, train = ModelConfig(size=64, filters=8), TrainConfig(batch_size=4)
    # as on a GPU: small gradients vanish in fp16 where they are not scaled
    bench.check(model, train, ["single-pass", "joint"], "fp16", torch.float16, torch.device("cpu"))
    bench.check(ModelConfig(size=32, filters=2, vanishing=True), train, ["joint"], "float32", None, torch.device("cpu"))


def test_what_torch_compile_changes_or_cannot_do_is_no_row(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, modes = ModelConfig(size=32, filters=2), TrainConfig(batch_size=2), ["textbook", "textbook+compile"]
    given = (model, train, modes, ["float32"], torch.device("cpu"), "default", 1)

    def broken(net: torch.nn.Module, mode: str, dtype: torch.dtype | None) -> Any:
        def run(*given: Any) -> Any:
            raise RuntimeError("no compiler\nand more")

        return run

    monkeypatch.setattr(objective, "_compiled", broken)
    with pytest.warns(UserWarning, match="torch.compile failed, going on without it: no compiler"):
        (row,) = bench.measure(*given)
    assert row.mode == "textbook" and row.ratio_compile is None
    monkeypatch.setattr(objective, "_compiled", lambda net, mode, dtype: lambda *given: 1.1 * net(*given))
    with pytest.raises(UserError, match=r"textbook\+compile in float32 has losses 0.\d+ from those without; not timed"):
        bench.measure(*given)


def test_the_yardstick_is_the_faster_memory_format(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0.3, 0.1, 0.2, 0.5, 0.1, 0.25])
    monkeypatch.setattr(bench, "turn", lambda *_: next(times))
    model, train = ModelConfig(size=32, filters=2), TrainConfig(batch_size=2)
    rows = bench.measure(model, train, ["textbook", "single-pass"], ["float32"], torch.device("cpu"), None, 2)
    assert [row.ms for row in rows] == [pytest.approx(100), pytest.approx(225)]
    assert rows[1].ratio_eager == pytest.approx((0.1 / 0.2 + 0.1 / 0.25) / 2)


def test_doctor_of_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--preset", "paper-64", "--device", "cpu", "--precision", "float32"]) == 0
    printed = capsys.readouterr().out
    assert "840.4 GFLOPs at batch 16" in printed and "17.9 MiB an image" in printed
    assert printed.count("worked out from free memory") == 2
    assert main(["doctor", "--preset", "big"]) == 2


def test_weights_are_taken_off_before_images_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    model, train, device = ModelConfig(size=32, filters=8), TrainConfig(), torch.device("cpu")
    found = capacity.capacity(model, train, device, None)
    free = int((found.fixed + 10.5 * found.per_image) / 0.9)
    monkeypatch.setattr(capacity, "available_memory", lambda device: free)
    assert capacity.capacity(model, train, device, None).largest == 10


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
