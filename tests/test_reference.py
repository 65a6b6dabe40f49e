"""Nothing public is without a docstring; `make docs` makes the reference of them."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

import pytest
from torch import nn

import fastbegan
import fastbegan.layers
import fastbegan_kernels
from tests.helpers.processes import ROOT


def _members(owner: Any) -> Iterator[tuple[str, Any]]:
    """Public methods and properties of a class and of those of ours that it derives from."""
    for cls in owner.__mro__ if isinstance(owner, type) else ():
        for name, held in vars(cls).items() if cls.__module__.split(".")[0].startswith("fastbegan") else ():
            held = held.__func__ if isinstance(held, classmethod | staticmethod) else held
            if not name.startswith("_") and isinstance(held, property | FunctionType) and not hasattr(nn.Module, name):
                yield f"{cls.__qualname__}.{name}", getattr(cls, name)


@pytest.mark.parametrize("module", [fastbegan, fastbegan.layers, fastbegan_kernels], ids=lambda module: module.__name__)
def test_everything_public_has_a_docstring(module: ModuleType) -> None:
    values = {name: getattr(module, name) for name in module.__all__}
    public = {name: value for name, value in values.items() if callable(value) or isinstance(value, ModuleType)}
    for value in list(public.values()):
        public |= dict(_members(value))
    assert len(public) >= len(module.__all__) - 2  # PRESETS and the version are plain values
    assert [name for name, value in public.items() if not _documented(value)] == []


def _documented(value: Any) -> bool:
    if not isinstance(value, type):
        return bool(inspect.getdoc(value))  # of a base class, where a method stands for its
    own = vars(value).get("__doc__") or ""
    return bool(own) and not own.startswith(f"{value.__name__}(")  # as dataclasses make it


def test_each_public_module_has_its_page() -> None:
    pages = {path.stem: path.read_text(encoding="utf-8") for path in (ROOT / "docs" / "reference").glob("*.md")}
    for name, module in (("fastbegan", fastbegan), ("layers", fastbegan.layers), ("kernels", fastbegan_kernels)):
        assert f"automodule:: {module.__name__}\n" in pages[name] and name in pages["index"]
