"""Data sets that are drawn by number, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from .faces import VERSION as FACES_VERSION
from .faces import faces
from .portraits import VERSION as PORTRAITS_VERSION
from .portraits import portraits

DEFAULT_COUNT = 16_384


@dataclass(frozen=True)
class Style:
    """A way to draw."""

    draw: Callable[[Tensor, int], Tensor]
    """Takes numbers of images, int64 [N], and their size; returns uint8 [N, size, size, 3]."""
    version: int
    """Changes whenever the same numbers give other pixels."""


STYLES = {"faces": Style(faces, FACES_VERSION), "portraits": Style(portraits, PORTRAITS_VERSION)}


def style_of(data: str) -> str | None:
    """The key of STYLES that `data` names, alone or with a count behind a colon; None for other data."""
    name = data.partition(":")[0]
    return name if name in STYLES else None
