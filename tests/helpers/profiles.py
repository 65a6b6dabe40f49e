"""ICC profiles made by hand, and the conversions to sRGB that they stand for, in NumPy."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

_D50 = np.array([0.9642, 1.0, 0.8249])  # the white of all profiles
_BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class Space:
    """An RGB space: x and y of red, green, blue and white, and its gamma (None: sRGB's curve)."""

    red: tuple[float, float]
    green: tuple[float, float]
    blue: tuple[float, float]
    white: tuple[float, float] = (0.3127, 0.3290)
    gamma: float | None = None

    def matrix(self) -> np.ndarray:
        """From linear light to XYZ under D50 [3, 3]."""
        primaries = np.stack([_xyz(self.red), _xyz(self.green), _xyz(self.blue)], axis=1)
        white = _xyz(self.white)
        under_own_white = primaries * np.linalg.solve(primaries, white)
        cones = (_BRADFORD @ _D50) / (_BRADFORD @ white)
        return np.linalg.inv(_BRADFORD) @ np.diag(cones) @ _BRADFORD @ under_own_white

    def light(self, levels: np.ndarray) -> np.ndarray:
        """Linear light of values from 0 to 1."""
        return _srgb_light(levels) if self.gamma is None else levels**self.gamma

    def profile(self) -> bytes:
        """A matrix/TRC profile of version 2."""
        names = (b"rXYZ", b"gXYZ", b"bXYZ")
        tags = {name: _xyz_tag(column) for name, column in zip(names, self.matrix().T, strict=True)}
        return _profile(b"mntr", b"RGB ", b"XYZ ", tags | {name: self._curve() for name in (b"rTRC", b"gTRC", b"bTRC")})

    def to_srgb(self, pixels: np.ndarray) -> np.ndarray:
        """The same colours as sRGB levels from 0 to 255, not rounded; pixels uint8 [..., 3]."""
        xyz = self.light(pixels / 255) @ self.matrix().T
        return _srgb_levels(xyz @ np.linalg.inv(SRGB.matrix()).T)

    def _curve(self) -> bytes:
        if self.gamma is not None:
            return b"curv" + struct.pack(">IIH", 0, 1, round(self.gamma * 256))
        table = (65535 * self.light(np.arange(4096) / 4095)).round().astype(">u2")
        return b"curv" + struct.pack(">II", 0, 4096) + table.tobytes()


SRGB = Space((0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
P3 = Space((0.68, 0.32), (0.265, 0.69), (0.15, 0.06))
ADOBE = Space((0.64, 0.33), (0.21, 0.71), (0.15, 0.06), gamma=2.19921875)
PROPHOTO = Space((0.7347, 0.2653), (0.1596, 0.8404), (0.0366, 0.0001), (0.3457, 0.3585), gamma=461 / 256)


def grey_profile(gamma: float) -> bytes:
    """A profile of grey images."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256))
    return _profile(b"mntr", b"GRAY", b"XYZ ", {b"kTRC": curve})


def grey_to_srgb(levels: np.ndarray, gamma: float) -> np.ndarray:
    """What `grey_profile` says of grey levels, as sRGB levels."""
    return _srgb_levels((levels / 255) ** gamma)


def cmyk_profile() -> bytes:
    """A profile of CMYK images whose four inks are greys: without ink the white of a grey paper, L* 25 lower with each.

    Only absolute colorimetry shows the grey of the paper.
    """
    ink = np.indices((2, 2, 2, 2)).sum(0)
    lab = np.stack([255 - 63.75 * ink, np.full_like(ink, 128), np.full_like(ink, 128)], -1).round().astype(np.uint8)
    ramp = bytes(range(256))
    identity = struct.pack(">9I", *(65536 * np.eye(3, dtype=int)).ravel().tolist())
    lut = b"mft1" + struct.pack(">IBBBx", 0, 4, 3, 2) + identity + ramp * 4 + lab.tobytes() + ramp * 3
    return _profile(b"prtr", b"CMYK", b"Lab ", {b"A2B0": lut, b"wtpt": _xyz_tag(0.8 * _D50)})


def _xyz(xy: tuple[float, float]) -> np.ndarray:
    x, y = xy
    return np.array([x / y, 1, (1 - x - y) / y])


def _srgb_light(levels: np.ndarray) -> np.ndarray:
    return np.where(levels <= 0.04045, levels / 12.92, ((levels + 0.055) / 1.055) ** 2.4)


def _srgb_levels(light: np.ndarray) -> np.ndarray:
    light = light.clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def _fixed(values: np.ndarray) -> bytes:
    return (65536 * np.asarray(values)).round().astype(">i4").tobytes()


def _xyz_tag(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + _fixed(values)


def _profile(kind: bytes, space: bytes, connection: bytes, tags: dict[bytes, bytes]) -> bytes:
    tags = {b"wtpt": _xyz_tag(_D50), **tags}
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, tag in tags.items():
        table += name + struct.pack(">II", start + len(body), len(tag))
        body += tag + b"\0" * (-len(tag) % 4)
    head = struct.pack(">I4xI4s4s4s", start + len(body), 0x02400000, kind, space, connection)
    head += struct.pack(">6H4s28x", 2024, 1, 1, 0, 0, 0, b"acsp") + _fixed(_D50)
    return head.ljust(128, b"\0") + table + body
