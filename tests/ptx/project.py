"""What the machine's tests know of the project's names. Whoever renames a kernel, a tile or a form looks here."""

from __future__ import annotations

import importlib
import pkgutil
import re
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import triton
from triton.runtime.jit import JITFunction

from fastbegan_kernels import conv_layer, dispatch, fused, problems
from fastbegan_kernels.fused import conv_tiles as tiles

IN_PLACE = {
    "_activation_kernel": ("y_ptr",),
    "_equilibrium_update_kernel": ("k_ptr", "sums_ptr", "window_ptr"),
}
"""Parameters whose memory a kernel changes on purpose. A store to another input is an error."""

Layer = conv_layer.Layer
FUSED = problems.FUSED
"""The form of checks in `problems.POINTWISE` with the kernel."""
EPILOGUE = conv_layer.EPILOGUE
"""The form of layers with library convolutions, and a kernel for what is pointwise around them."""

Tile = tiles.AnyTile
TmaTile = tiles.TmaTile
SMALL_HALF, MIDDLE_HALF, SMALL_FULL = tiles.HALF[-1], tiles.HALF[2], tiles.FULL[-1]
"""Tiles for the forms that the gate does not compile."""


def forgiven(kernel: str) -> tuple[str, ...]:
    """Errors that are no fault of this kernel.

    Triton before 3.9 (seen in 3.6) makes no proxy fence between cp.async and wgmma. PTX asks for it.
    """
    old = tuple(map(int, triton.__version__.split(".")[:2])) < (3, 9)
    return ("proxy fence missing after cp.async",) * old


def modules() -> Iterator[ModuleType]:
    """Those that hold kernels and their launchers."""
    for found in pkgutil.iter_modules(fused.__path__, f"{fused.__name__}."):
        yield importlib.import_module(found.name)


def kernels(module: ModuleType) -> dict[str, JITFunction]:
    """The attributes of a module that are kernels."""
    found = {name: value for name, value in vars(module).items() if name.endswith("_kernel")}
    return {name: value for name, value in found.items() if isinstance(value, JITFunction)}


def refusal() -> tuple[ModuleType, str]:
    """What refuses to run fused forms on CPU tensors."""
    return dispatch, "_require_fused"


def form_of(tile: Tile) -> problems.Form:
    """The form of a layer that runs this tile."""
    return tile


class MatrixCase(NamedTuple):
    """A gate configuration of a matrix product, taken from its name."""

    label: str
    dtype: str  # bf16, fp16, fp32, or tf32
    tile: Tile
    channels: str  # "odd", "left over", or nothing where blocks are full

    @property
    def kind(self) -> str:
        """Of the layer."""
        return "up" if self.label.startswith("upconv") else "down" if "stride 2" in self.label else "same"

    @property
    def backward(self) -> bool:
        """Whether it is an input gradient."""
        return "gradient" in self.label

    @property
    def has_skip(self) -> bool:
        """Whether a phase table is added."""
        return "skip" in self.label


def matrix_case(name: str) -> MatrixCase | None:
    """None for the name of an elementwise kernel."""
    head, _, channels = name.partition(", channels ")
    found = re.fullmatch(r"(.+) (\w+) ((?:pointer|tma) .+)", head)
    return MatrixCase(found[1], found[2], tiles.tile_named(found[3]), channels) if found else None
