"""Installs the pretended devices as soon as torch is imported, in this process and in its children.

Python imports a module of this name at its start, from any folder on PYTHONPATH. See the package above.
"""

import importlib.abc
import importlib.machinery
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


class _After(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds one module as usual, and calls `then` with it once it was executed."""

    def __init__(self, name: str, then: Callable[[ModuleType], None]) -> None:
        self._name, self._then = name, then
        self._loader: Any = None

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname != self._name:
            return None
        sys.meta_path.remove(self)
        found = importlib.machinery.PathFinder.find_spec(fullname, path)
        if found is not None:
            self._loader, found.loader = found.loader, self
        return found

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        assert module.__spec__ is not None
        module.__spec__.loader = module.__loader__ = self._loader
        self._loader.exec_module(module)
        self._then(module)


def _install(_: ModuleType) -> None:
    from tests.pretended.install import install

    install()


def _tune(module: ModuleType) -> None:
    from tests.pretended.tuning import patch

    patch(module)


if os.environ.get("PRETENDED_GPUS"):
    sys.meta_path.insert(0, _After("torch", _install))
    if os.environ.get("PRETENDED_TUNING"):
        sys.meta_path.insert(0, _After("fastbegan_kernels.tuning", _tune))
