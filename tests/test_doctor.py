"""`fastbegan doctor` says what runs and why."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastbegan.cli import main
from fastbegan.commands import doctor
from fastbegan_kernels import conv_layer, tuning
from fastbegan_kernels.child import Trial
from fastbegan_kernels.problems import PLAIN, POINTWISE, Pointwise

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("impl", "reason"), [(None, "no GPU"), ("algebraic", "no GPU"), ("reference", "FASTBEGAN_IMPL asks for it")]
)
def test_every_op_has_a_row(
    impl: str | None, reason: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setenv("FASTBEGAN_IMPL", impl or "")
    assert main(["doctor", "--device", "cpu", "--precision", "float32"]) == 0
    shown = capsys.readouterr().out
    assert all(op in shown for op in ("conv2d_elu, stride 2", "upsample_conv2d_elu", *POINTWISE))
    assert shown.count(reason) == 3 + len(POINTWISE) and f"torch {torch.__version__}" in shown


def test_bad_values_are_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--size", "7"]) == 2
    assert "size is 7; accepted: even numbers" in capsys.readouterr().err
    assert main(["doctor", "--filters", "0"]) == 2
    assert "filters is 0" in capsys.readouterr().err


def test_a_verdict_names_times_and_faults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a GPU's rows say, on the interpreter: the forms of a forced tier, tried and timed."""
    pytest.importorskip("triton")
    monkeypatch.setenv("FASTBEGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "survivors", lambda problem, device, forms, **_: dict.fromkeys(forms, Trial(None)))
    problem = doctor.layers("float32", 16, 4, 1)[0]
    form, why = doctor._verdict(problem, CPU, "fused")
    assert form in [tile.name for tile in problem.forms(CPU, "fused")] and why.startswith("right; ") and " us" in why
    assert doctor._verdict(Pointwise("fold", "float32"), CPU, "auto") == ("fused", "right")
    forward = conv_layer._forward
    monkeypatch.setattr(conv_layer, "_forward", lambda form, *rest: forward(form, *rest) + (form != PLAIN))
    form, why = doctor._verdict(problem, CPU, "fused")
    assert form == "plain PyTorch" and "gave wrong values" in why
    monkeypatch.setattr(tuning, "survivors", lambda p, d, forms, **_: dict.fromkeys(forms, Trial("crashed in a trial")))
    assert "crashed in a trial" in doctor._verdict(problem, CPU, "fused")[1]


@pytest.mark.parametrize(
    ("capability", "words"),
    [((6, 0), "fused ones need sm_80"), ((8, 0), "descriptors (TMA) need sm_90"), ((9, 0), "by descriptors (TMA)")],
)
def test_the_tier_of_a_card_and_why(monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], words: str) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    line = doctor.tier(torch.device("cuda"))
    assert line.startswith(f"sm_{capability[0]}{capability[1]}: ") and words in line
