"""Memory that a kernel should have written, and did not, is NaN: for tests and for checks on a GPU alike."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastbegan_kernels.fused import launch, packing


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


@contextmanager
def poisoned() -> Iterator[None]:
    """Inside, the launchers get such memory; torch's own functions do not, as torch would keep the patched ones."""
    poison = _Poisoning()
    with mock.patch.object(launch, "torch", poison), mock.patch.object(packing, "torch", poison):
        yield
