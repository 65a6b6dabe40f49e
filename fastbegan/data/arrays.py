"""torchvision's small data sets, from files that are there already."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from .decode import RejectedImageError, crop_box
from .scale import scale

NAMES = {"cifar10": "CIFAR10", "fashion-mnist": "FashionMNIST"}


def load(name: str, root: Path) -> tuple[str, np.ndarray]:
    """Description and pictures, uint8 [count, height, width, 3], of the training part below `root`.

    Nothing is downloaded. torchvision checks CIFAR-10's files against its own checksums before it unpickles them.
    Raises UserError where torchvision or the files are missing.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise UserError(f"data {name} needs torchvision: pip install torchvision") from None
    try:
        pictures = getattr(datasets, NAMES[name])(str(root), train=True, download=False).data
    except Exception as error:  # whatever reading garbage comes to
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"data {name}:{root}: torchvision finds no {NAMES[name]} there ({why})") from None
    pictures = np.asarray(pictures, dtype=np.uint8)
    if pictures.ndim == 3:  # grey
        pictures = np.repeat(pictures[..., None], 3, axis=3)
    return f"{NAMES[name]} of {root.resolve()}", pictures


def scaled(pictures: np.ndarray, size: int, crop: str) -> np.ndarray:
    """Cropped and scaled as files are. Raises UserError for a crop that does not fit."""
    height, width = pictures.shape[1:3]
    try:
        box = crop_box((width, height), crop)
    except RejectedImageError as error:
        raise UserError(f"crop {crop}: {error}") from None
    left, top, right, bottom = box
    return scale(list(pictures[:, top:bottom, left:right]), size)
