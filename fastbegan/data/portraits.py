"""Procedural portraits: many traits, any wall and clothes; no download, any size; image i depends on (seed, i) only."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .drawing import Canvas, Traits, bar, both, in_parts, oval

VERSION = 1  # to be raised whenever the same numbers give other portraits

_SKIN = ("ffe3cb", "f6cfae", "eab98d", "d49e73", "b57c50", "8a5a3b", "643f2b", "f9d9c0")
_HAIR = ("1f1713", "3d271b", "654026", "94602f", "c99a52", "e8cf92", "8e3318", "b9b7b3", "575a66", "b3502f")
_CLOTHES = ("355a93", "a63a3f", "3f7d58", "e4e1da", "2e3038", "dba03e", "77549b", "4f969c", "c9707a")
_WALL = ("c3dbee", "f1dcc6", "d5e6cd", "e6d5ea", "f7eab9", "b7c5d4", "ebebe8", "8090a6", "a8746c", "9cc1b8")
_IRIS = ("4a301b", "6f4d2b", "3f6f97", "557f51", "5c6670", "2b211a")
_LIPS = ("b9544f", "a14a46", "cc706a", "8c3f3c", "c43f5c")
_FRAMES = ("1f1f23", "5a3421", "9c2a28", "46506e", "b58a3a")
_WHITE, _DARK = (0.97, 0.97, 0.97), (0.22, 0.07, 0.07)


@dataclass(frozen=True)
class _Head:
    """N heads: coordinates of the pixels in each head's own frame, its outline and colours."""

    x: Tensor
    y: Tensor
    turn: Tensor
    """How far the features (eyes, nose, mouth) shift against the skull."""
    wide: Tensor
    tall: Tensor
    jaw: Tensor
    skin: Tensor
    hair: Tensor

    @property
    def fx(self) -> Tensor:
        """x for the features."""
        return self.x - self.turn

    def skull(self, dy: float, scale: float, power: Tensor | float) -> Tensor:
        """Distance to the outline of the skull, narrower towards the jaw."""
        x = self.x / (1 - self.jaw * (self.y / self.tall).clamp(-0.2, 1))
        return oval(x, self.y + dy, self.wide * scale, self.tall * scale, power)


@in_parts
def portraits(index: Tensor, size: int, seed: int) -> Tensor:
    """Draw portraits by number; see `in_parts`."""
    t = Traits(index, seed)
    canvas = Canvas(len(index), size, index.device)
    cover, paint = canvas.cover, canvas.paint

    # wall: two colours, a slanted blend
    wall, shade = t.colour(_WALL), t.colour(_WALL)
    slope = ((canvas.x * t.between(-1.2, 1.2) + canvas.y) * 0.5 + 0.5).clamp(0, 1)
    canvas.image.copy_(torch.lerp(wall.expand_as(canvas.image), shade * 0.8, slope[..., None]))

    # position and pose of the head
    centre_x, centre_y = t.between(-0.07, 0.07), t.between(-0.02, 0.1)
    zoom, tilt = t.between(0.9, 1.1), t.between(-0.1, 0.1)
    turn = t.between(-0.13, 0.13)
    u, v = (canvas.x - centre_x) / zoom, (canvas.y - centre_y) / zoom
    x, y = u * tilt.cos() + v * tilt.sin(), v * tilt.cos() - u * tilt.sin()
    wide, tall = t.between(0.41, 0.53), t.between(0.55, 0.67)
    jaw, square = t.between(-0.08, 0.2), t.between(2.0, 2.5)
    skin, hair, shirt = t.colour(_SKIN), t.colour(_HAIR), t.colour(_CLOTHES)
    head = _Head(x, y, turn, wide, tall, jaw, skin, hair)

    # one hair style per portrait: long, bald, round (curls), bun, else short
    style, length = t.between(), t.between()
    is_long, is_bald = (style < 0.36).float(), ((style >= 0.36) & (style < 0.44)).float()
    is_round, is_bun = ((style >= 0.44) & (style < 0.56)).float(), ((style >= 0.56) & (style < 0.66)).float()
    paint(
        cover(oval(x, y - 0.06 - 0.14 * length, wide * 1.27, tall * (1.03 + 0.42 * length), 2.7)) * is_long,
        hair * 0.8,
    )
    paint(cover(oval(x, y + 0.2, wide * 1.42, tall * 1.07, 2.2)) * is_round, hair * 0.88)
    paint(cover(torch.hypot(x, y + tall * 1.13) - 0.19) * is_bun, hair * 0.9)

    # shoulders, collar, neck
    paint(cover(oval(canvas.x - centre_x, canvas.y - 1.24, t.between(0.7, 0.92), 0.48, 2.8)), shirt)
    neck = bar(
        canvas.y - centre_y - 0.55 * zoom,
        canvas.x - centre_x,
        torch.full_like(wide, 0.26),
        wide * 0.42 * zoom,
    )
    paint(cover(neck - 0.035) * cover(0.86 - canvas.y) * t.chance(0.5), shirt * 0.75)
    paint(cover(neck), skin * 0.84)

    # ears, then the head under one soft light
    for side in (-1, 1):
        paint(cover(oval(x - side * wide * 0.98 + turn * 0.3, y - 0.05, 0.08, 0.125)), skin * 0.88)
    outline = head.skull(0.0, 1.0, square)
    on_head = cover(outline)
    glow = 1.03 + 0.12 * (t.between(-0.9, 0.9) * x / wide - 0.4 * y / tall) - 0.15 * ((x / wide) ** 2 + (y / tall) ** 2)
    paint(on_head, (skin * glow.clamp(0.6, 1.15)[..., None]).clamp(0, 1))
    blush = t.chance(0.6) * t.between(0.1, 0.35)
    for side in (-1, 1):
        spot = torch.exp(-((head.fx - side * wide * 0.55) ** 2 + (y - 0.2) ** 2) / 0.02)
        paint(spot * blush * on_head, skin * torch.tensor([1.0, 0.62, 0.58], device=skin.device))

    eye_y, spread = _eyes(t, canvas, head)
    _nose_and_mouth(t, canvas, head, outline, may_have_beard=1 - is_long)
    _front_hair(t, canvas, head, length, has_hair=1 - is_bald)
    _glasses(t, canvas, head, eye_y, spread)

    exposure = t.between(0.9, 1.06)[..., None]
    return canvas.image.mul_(exposure).clamp_(0, 1)


def _eyes(t: Traits, canvas: Canvas, head: _Head) -> tuple[Tensor, Tensor]:
    """Draw eyes and brows; returns the height of the eyes and their distance from the middle."""
    cover, paint = canvas.cover, canvas.paint
    fx, y, hair = head.fx, head.y, head.hair
    spread, eye_y = t.between(0.17, 0.23), t.between(-0.06, 0.04)
    rx, ry = t.between(0.075, 0.11), t.between(0.045, 0.085)
    iris, look_x, look_y = t.colour(_IRIS), t.between(-0.3, 0.3), t.between(-0.2, 0.2)
    brow_y, brow_tilt, brow_r = t.between(0.13, 0.19), t.between(-0.3, 0.3), t.between(0.016, 0.034)
    for side in (-1, 1):
        ex, ey = fx - side * spread, y - eye_y
        lid = oval(ex, ey, rx, ry)
        white = cover(lid)
        paint(white, _WHITE)
        radius = ry * 0.82 + 0.012
        disc = torch.hypot(ex - look_x * rx, ey - look_y * ry) - radius
        paint(white * cover(disc), iris)
        paint(white * cover(disc + radius * 0.5), iris * 0.15)
        paint(white * cover(torch.hypot(ex - look_x * rx + 0.018, ey - look_y * ry + 0.018) - 0.014), _WHITE)
        paint(cover(lid.abs() - 0.011) * (ey < 0).float(), hair * 0.35)
        brow = bar(ex, ey + brow_y + side * brow_tilt * ex + 1.6 * ex**2, rx * 0.95, brow_r)
        paint(cover(brow), hair * 0.6)
    return eye_y, spread


def _nose_and_mouth(t: Traits, canvas: Canvas, head: _Head, outline: Tensor, *, may_have_beard: Tensor) -> None:
    cover, paint = canvas.cover, canvas.paint
    fx, y, turn, skin, hair = head.fx, head.y, head.turn, head.skin, head.hair
    nose_y, nose_w = t.between(0.16, 0.24), t.between(0.035, 0.07)
    paint(cover(oval(fx - turn * 0.4, y - nose_y, nose_w, 0.032)) * 0.55, skin * 0.74)
    ridge = torch.exp(-((fx - turn * 0.4) ** 2 / 0.0016 + (y - nose_y * 0.55) ** 2 / 0.02))
    paint(ridge * 0.25, (skin * 1.12).clamp(max=1))

    mouth_y, half, smile = t.between(0.34, 0.42), t.between(0.1, 0.19), t.between(-0.9, 2.4)
    opening = t.between(-0.12, 0.1).clamp(min=0)
    beard, moustache = t.chance(0.16) * may_have_beard, t.chance(0.18) * may_have_beard
    cheeks = both(outline, 0.22 - y - 0.9 * fx**2)
    hole = oval(fx, y - mouth_y, half * 1.15, 0.075)
    paint(cover(both(cheeks, -hole)) * beard * 0.92, hair * 0.8)
    paint(cover(bar(fx, y - mouth_y + 0.085 + 0.8 * fx**2, half * 0.7, 0.028)) * moustache, hair * 0.7)

    line = y - mouth_y + smile * (fx**2 - half**2 * 0.5)
    paint(cover(bar(fx, line, half, 0.022 + opening * 0.5)), t.colour(_LIPS))
    paint(cover(bar(fx, line, half * 0.82, opening * 0.42 - 0.004)) * (opening > 0.012), _DARK)
    teeth = both(bar(fx, line, half * 0.76, opening * 0.42 - 0.006), line + 0.004)
    paint(cover(teeth) * (opening > 0.03), _WHITE)


def _front_hair(t: Traits, canvas: Canvas, head: _Head, length: Tensor, *, has_hair: Tensor) -> None:
    """Draw the hair between the skull's outline and a curved hairline with a parting."""
    x, y = head.x, head.y
    parting, line, fringe = t.between(-0.35, 0.35), t.between(-0.42, -0.22), t.between(0, 0.9)
    skull = head.skull(0.05, 1.1, 2.2)
    from_parting = x - parting * head.wide
    hairline = y - line - fringe * from_parting**2 * torch.where(from_parting > 0, 1.0, 0.5)
    strands = 0.93 + 0.07 * torch.sin((x * 38 + 6 * torch.sin(y * 9 + parting * 9)) * (1 + length))
    canvas.paint(canvas.cover(both(skull, hairline)) * has_hair, head.hair * strands[..., None])


def _glasses(t: Traits, canvas: Canvas, head: _Head, eye_y: Tensor, spread: Tensor) -> None:
    fx, y = head.fx, head.y
    wears, radius, frame = t.chance(0.22), t.between(0.13, 0.16), t.colour(_FRAMES)
    for side in (-1, 1):
        rim = oval(fx - side * spread, y - eye_y, radius, radius * 0.85, 2.6).abs() - 0.016
        canvas.paint(canvas.cover(rim) * wears, frame)
    bridge = bar(fx, y - eye_y + 0.01, (spread - radius).clamp(min=0.01), 0.014)
    canvas.paint(canvas.cover(bridge) * wears, frame)
