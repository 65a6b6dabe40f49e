"""Kernels are tested in exact float32 and on memory that is NaN until they write it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from fastbegan_kernels.dispatch import HAS_TRITON


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    if not HAS_TRITON:
        yield
        return
    from bench.poison import poisoned

    with poisoned():
        yield


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
