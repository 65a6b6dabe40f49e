"""Kernels are tested in exact float32 and on memory that is NaN until they write it."""

from __future__ import annotations

import importlib
import os
import pkgutil
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from fastbegan_kernels.dispatch import HAS_TRITON


class _Poisoning:
    """torch, except that the memory it allocates is NaN."""

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in ("empty", "empty_like"):
            return value

        def allocate(*arguments: Any, **options: Any) -> Tensor:
            tensor = value(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return allocate


@pytest.fixture(autouse=True)
def _poisoned(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the launchers get such memory: torch's own functions would keep what they were patched with."""
    if HAS_TRITON:
        from fastbegan_kernels import fused

        for name in (module.name for module in pkgutil.iter_modules(fused.__path__)):
            module = importlib.import_module(f"{fused.__name__}.{name}")
            if hasattr(module, "torch"):
                monkeypatch.setattr(module, "torch", _Poisoning())


@pytest.fixture(autouse=True)
def _exact_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol() -> Iterator[Any]:
    """End an xdist worker whose CUDA context a test lost: no later test could run there, and xdist starts another."""
    done = yield
    if torch.cuda.is_available() and "PYTEST_XDIST_WORKER" in os.environ:
        try:
            torch.cuda.synchronize()
        except Exception:
            os._exit(1)
    return done
