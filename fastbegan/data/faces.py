"""Procedural faces, the default data set: no download, any size; image i depends on (seed, i) only.

Flat colours, sharp edges and continuous traits, which a small net learns. Faces vary much, walls and clothes little:
what lies far from the median is what an L1 loss gives up first.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drawing import Canvas, Traits, bar, blend, both, in_parts, oval

VERSION = 2  # to be raised whenever the same numbers give other faces; 1 are now `portraits`

# the brightness of both falls and rises in equal steps
_SKIN = ("ffe0c7", "eebd96", "cf9568", "a66e48", "7d4f35")
_HAIR = ("1a1413", "52301f", "8a5231", "b87a41", "d6a462")
_IRIS = ("3a2416", "5b4022", "4f6b3d", "3f6f9c")
_LIPS = ("a2453f", "cb5a5c")
_WALL = ("86a9bf", "9abacd")
_CLOTHES = ("3f5f86", "5f86ab")
_VOLUME, _LENGTH = (0.03, 0.2), (0.0, 1.2)
_WHITE, _PUPIL = (0.98, 0.98, 0.98), (0.06, 0.05, 0.06)


@dataclass(frozen=True)
class _Head:
    """N heads: coordinates of the pixels in each head's own frame, its size and colours."""

    x: Tensor
    y: Tensor
    wide: Tensor
    tall: Tensor
    skin: Tensor
    hair: Tensor


@in_parts
def faces(index: Tensor, size: int, seed: int) -> Tensor:
    """Draw faces by number; see `in_parts`."""
    t = Traits(index, seed)
    canvas = Canvas(len(index), size, index.device)
    canvas.image.copy_(blend(_WALL, t.between()).expand_as(canvas.image))
    x, y = canvas.x - t.between(-0.03, 0.03), canvas.y - t.between(-0.02, 0.04)
    tan, lightness = t.between(), t.between()
    # always darker than the skin: G would draw nothing but hair like skin, which D finds easiest
    skin, hair = blend(_SKIN, tan), blend(_HAIR, lightness * (1 - 0.95 * tan))
    head = _Head(x, y, t.between(0.47, 0.6), t.between(0.6, 0.7), skin, hair)
    volume = _hair_behind(t, canvas, head)
    _body(t, canvas, head)
    _skull(t, canvas, head)
    _eyes(t, canvas, head)
    _nose_and_mouth(t, canvas, head)
    _hair_in_front(t, canvas, head, volume)
    return canvas.image.clamp_(0, 1)


def _hair_behind(t: Traits, canvas: Canvas, head: _Head) -> Tensor:
    """Draw the hair behind head and shoulders, from cropped to long; returns its thickness above the skull."""
    volume, length = t.between(*_VOLUME), t.between(*_LENGTH)
    cap = oval(head.x, head.y + 0.06, head.wide + volume, head.tall + volume, 2.3)
    ends = length - 0.25 * (head.x.abs() / (head.wide + volume)) ** 4
    sides = both(head.x.abs() - head.wide - volume * 0.9, both(head.y - ends, -head.y - 0.1))
    canvas.paint(canvas.cover(both(cap, head.y - 0.1 - volume)), head.hair * 0.86)
    canvas.paint(canvas.cover(sides), head.hair * 0.86)
    return volume


def _body(t: Traits, canvas: Canvas, head: _Head) -> None:
    shirt = blend(_CLOTHES, t.between())
    canvas.paint(canvas.cover(oval(head.x, head.y - 1.3, t.between(0.78, 0.92), 0.5, 2.6)), shirt)
    neck = both(head.x.abs() - head.wide * 0.4, both(head.y - 0.92, -head.y))
    canvas.paint(canvas.cover(neck), head.skin * 0.84)


def _skull(t: Traits, canvas: Canvas, head: _Head) -> None:
    for side in (-1, 1):
        canvas.paint(canvas.cover(oval(head.x - side * head.wide, head.y - 0.06, 0.08, 0.13)), head.skin * 0.9)
    jaw = t.between(0.0, 0.22)
    x = head.x / (1 - jaw * (head.y / head.tall).clamp(0, 1))
    canvas.paint(canvas.cover(oval(x, head.y - 0.02, head.wide, head.tall, t.between(2.0, 2.5))), head.skin)


def _eyes(t: Traits, canvas: Canvas, head: _Head) -> None:
    cover, paint = canvas.cover, canvas.paint
    spread, wide, tall = head.wide * t.between(0.4, 0.46), t.between(0.115, 0.145), t.between(0.08, 0.115)
    iris, look = blend(_IRIS, t.between()), t.between(-0.25, 0.25)
    brow_y, brow_tilt = t.between(0.17, 0.23), t.between(-0.35, 0.35)
    for side in (-1, 1):
        x, y = head.x - side * spread, head.y - 0.02
        white = cover(oval(x, y, wide, tall))
        paint(white, _WHITE)
        disc = torch.hypot(x - look * wide, y) - 0.072
        paint(white * cover(disc), iris)
        paint(white * cover(disc + 0.035), _PUPIL)
        paint(cover(torch.hypot(x - look * wide + 0.02, y + 0.022) - 0.014), _WHITE)
        paint(cover(oval(x, y, wide, tall).abs() - 0.013) * (y < 0).float(), head.hair * 0.4)
        paint(cover(bar(x, y + brow_y + side * brow_tilt * x + 1.2 * x**2, wide * 0.9, 0.03)), head.hair * 0.55)


def _nose_and_mouth(t: Traits, canvas: Canvas, head: _Head) -> None:
    cover, paint = canvas.cover, canvas.paint
    x, y = head.x, head.y
    paint(cover(oval(x, y - 0.2, t.between(0.05, 0.085), 0.04)), head.skin * 0.78)
    half, smile, opening = t.between(0.13, 0.23), t.between(-0.3, 2.0), t.between(-0.06, 0.09).clamp(min=0)
    line = y - 0.4 + smile * (x**2 - half**2 * 0.5)
    lips = blend(_LIPS, t.between())
    paint(cover(bar(x, line, half, 0.035 + opening * 0.5)), lips)
    paint(cover(bar(x, line, half * 0.84, opening * 0.5 - 0.008)), _WHITE)


def _hair_in_front(t: Traits, canvas: Canvas, head: _Head, volume: Tensor) -> None:
    """Draw the hair above a slanted, curved hairline."""
    x, y = head.x, head.y
    line, slant, curve = t.between(-0.48, -0.3), t.between(-0.3, 0.3), t.between(0.1, 0.8)
    cap = oval(x, y + 0.06, head.wide + volume * 0.75, head.tall + volume * 0.75, 2.3)
    canvas.paint(canvas.cover(both(cap, y - line - slant * x - curve * x**2)), head.hair)
