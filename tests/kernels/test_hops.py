"""The way from a public op to its kernel: how many of our functions and modules a call passes through."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import fastbegan_kernels
from fastbegan_kernels import conv2d_elu, fold, upsample_conv2d_elu
from tests.helpers.oracle import random_tensor

pytest.importorskip("triton")
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="watches the interpreter's launch")
FOLDER = Path(fastbegan_kernels.__file__).parent


def _ours(frame: Any) -> str | None:
    """The module of a frame in our package."""
    path = Path(frame.f_code.co_filename)
    return str(path.relative_to(FOLDER)) if path.is_relative_to(FOLDER) else None


def _frames(frame: Any) -> Iterator[Any]:
    while frame is not None:
        yield frame
        frame = frame.f_back


def _watched(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> tuple[set[str], list[str]]:
    """Modules whose code a warm call runs above its kernels, and our functions on the stack at the last launch."""
    from triton.runtime.interpreter import GridExecutor

    modules: set[str] = set()
    stack: list[str] = []
    launch = GridExecutor.__call__

    def watch(frame: Any, event: str, _: object) -> None:
        if event == "call" and (module := _ours(frame)):
            modules.add(module)

    def launched(self: Any, *arguments: Any, **settings: Any) -> Any:
        sys.setprofile(None)
        stack[:] = [frame.f_code.co_name for frame in _frames(sys._getframe(1)) if _ours(frame)]
        try:
            return launch(self, *arguments, **settings)
        finally:
            sys.setprofile(watch)

    for _ in range(2):
        call()
    monkeypatch.setattr(GridExecutor, "__call__", launched)
    sys.setprofile(watch)
    try:
        call()
    finally:
        sys.setprofile(None)
    return modules, stack


X, WEIGHT, BIAS = random_tensor(1, 8, 4, 4, seed=1), random_tensor(8, 8, 3, 3, seed=2), random_tensor(8, seed=3)
FOLDED = fold([WEIGHT], ["up"])[0]


@pytest.mark.parametrize(
    "call",
    [
        pytest.param(lambda: conv2d_elu(X, WEIGHT, BIAS, impl="fused"), id="conv2d_elu"),
        pytest.param(lambda: upsample_conv2d_elu(X, WEIGHT, BIAS, impl="fused"), id="upsample_conv2d_elu"),
        pytest.param(lambda: upsample_conv2d_elu(X, FOLDED, BIAS, impl="fused"), id="folded"),
    ],
)
def test_a_call_is_short(call: Callable[[], object], monkeypatch: pytest.MonkeyPatch) -> None:
    modules, stack = _watched(call, monkeypatch)
    assert len(stack) <= 7, stack
    assert len(modules) <= 10, sorted(modules)
