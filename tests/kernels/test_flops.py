"""The registered FLOP formulas equal what the algebraic tier counts in plain operations."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from fastbegan_kernels import conv_stage, flops, fold

pytestmark = pytest.mark.core
stage = importlib.import_module("fastbegan_kernels.conv_stage")  # its name is the function's too
CASES = [("same same", 3), ("same down", 3), ("same same up", 3), ("up", 3), ("down up same", 3), ("same", 1)]


@pytest.mark.parametrize(("kinds", "window"), CASES)
@pytest.mark.parametrize("needed", ["x", "weights", "all", "last bias", "second copy"])
@pytest.mark.parametrize("copies", [1, 2])
def test_formulas_are_those_of_the_algebraic_tier(
    kinds: str, window: int, needed: str, copies: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert flops is not None
    names = kinds.split()
    widths = [6 + 2 * number for number in range(len(names) + 1)]
    if needed == "second copy" and copies == 1:
        return
    x = torch.empty(2, widths[0], 7, 6, device="meta", requires_grad=needed in ("x", "all"))
    weights, biases = [], []
    for copy in range(copies):
        for number, kind in enumerate(names):
            last = needed == "last bias" and number == len(names) - 1
            wanted = needed in ("weights", "all") or (needed == "second copy" and copy == 1)
            weight = torch.empty(widths[number + 1], widths[number], window, window, device="meta")
            folded = fold([weight], ["up" if kind == "up" else "conv"])[0].detach()
            weights.append(folded.requires_grad_(wanted))
            biases.append(torch.empty(widths[number + 1], device="meta", requires_grad=wanted or last))
    counts = []
    for impl in ("plain", "auto"):  # on meta tensors: "auto" is what a GPU without a kernel runs
        monkeypatch.setattr(stage, "op_impl", lambda *_, impl=impl: impl)
        with FlopCounterMode(display=False) as forward:
            result = conv_stage(x, weights, biases, kinds=names, copies=copies)
        with FlopCounterMode(display=False) as backward:
            result.sum().backward()
        counts.append((forward.get_total_flops(), backward.get_total_flops()))
    assert counts[0] == counts[1] and counts[0][0] > 0
    assert (counts[0][1] > 0) == (needed != "last bias")
