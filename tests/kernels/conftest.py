"""Kernels are tested in exact float32 and on memory that is NaN until they write it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastbegan_kernels.dispatch import HAS_TRITON


class _Poisoning:
    """torch, but memory that it hands out is NaN until something is written."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in ("empty", "empty_like"):
            return value

        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = value(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    if HAS_TRITON:
        from fastbegan_kernels.fused import launch

        # in the launchers only: patched for all, torch.empty would stay patched in torch's caches of its own functions
        monkeypatch.setattr(launch, "torch", _Poisoning())


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
