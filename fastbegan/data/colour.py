"""Colours of a picture file as sRGB: by its ICC profile, or by the gamma of a PNG. No torch here either."""

from __future__ import annotations

import functools
import io

import numpy as np
from PIL import Image, ImageCms

_LEVELS = np.arange(0, 256, 17, dtype=np.uint8)
_LATTICE = np.stack(np.meshgrid(_LEVELS, _LEVELS, _LEVELS), axis=-1).reshape(64, 64, 3)
_RAMP = np.arange(256, dtype=np.uint8)[None]
_GAMMAS = (0.05, 20.0)  # a PNG that declares another one is damaged
_SRGB_GAMMA = 1 / 2.2  # what PNG writers declare for sRGB


class UnusableProfileError(Exception):
    """The profile is damaged, or describes other colours than the image has."""


@functools.lru_cache(maxsize=16)  # a data set has one profile or a few
def conversion(profile: bytes, mode: str) -> ImageCms.ImageCmsTransform | None:
    """Find the conversion to 8-bit sRGB of images with this profile.

    Relative colorimetric, so white stays white; without black-point compensation, as colour management defines it.

    Args:
        profile: An ICC profile.
        mode: Pillow's mode of the images.

    Returns:
        None where the profile is sRGB in effect: no colour of a lattice (of greys: no grey) moves by over one level.

    Raises:
        UnusableProfileError: The profile is damaged, or is not one of this mode's colours.
    """
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent.RELATIVE_COLORIMETRIC
        transform = ImageCms.ImageCmsTransform(source, _srgb(), mode, "RGB", intent)
    except (OSError, ValueError) as error:
        raise UnusableProfileError(str(error)) from None
    if mode not in ("L", "RGB"):
        return transform
    before = _RAMP if mode == "L" else _LATTICE
    after = np.asarray(transform.apply(Image.fromarray(before)), dtype=np.int16)
    shift = np.abs(after - (before[..., None] if mode == "L" else before)).max()
    return transform if shift > 1 else None


@functools.cache
def _srgb() -> ImageCms.ImageCmsProfile:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))


def gamma_table(gamma: float) -> list[int] | None:
    """Give the sRGB level of each of the 256 levels of a PNG that declares this gamma and no colour space.

    Args:
        gamma: As in its gAMA chunk: light to this power is stored.

    Returns:
        None where it is within 5 % of sRGB's, which encoders write, rounded in many ways, for sRGB itself.

    Raises:
        UnusableProfileError: No picture has this gamma.
    """
    if not _GAMMAS[0] <= gamma <= _GAMMAS[1]:
        raise UnusableProfileError(f"a gamma of {gamma:g}")
    if abs(gamma / _SRGB_GAMMA - 1) <= 0.05:
        return None
    light = (np.arange(256) / 255) ** (1 / gamma)
    encoded = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return (255 * encoded).round().astype(int).tolist()
