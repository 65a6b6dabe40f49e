"""torchvision's small data sets, read from local files."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import UserError
from .decode import RejectedImageError, crop_box
from .scale import scale

NAMES = {"cifar10": "CIFAR10", "fashion-mnist": "FashionMNIST"}


def load(name: str, root: Path) -> tuple[str, np.ndarray]:
    """Read the training part of data set `name` (a key of NAMES) below the folder `root`; nothing is downloaded.

    Returns:
        A description, and the pictures: uint8 [count, height, width, 3]. Grey ones get three equal channels.

    Raises:
        UserError: torchvision or the files are missing, or the files are damaged.
    """
    try:
        from torchvision import datasets
    except ImportError:
        raise UserError(f"data {name} needs torchvision: pip install torchvision") from None
    try:  # torchvision checks CIFAR-10 against its own checksums before it unpickles anything
        pictures = getattr(datasets, NAMES[name])(str(root), train=True, download=False).data
    except Exception as error:  # damaged files make torchvision raise nearly anything
        why = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"data {name}:{root}: torchvision finds no {NAMES[name]} there ({why})") from None
    pictures = np.asarray(pictures, dtype=np.uint8)
    if pictures.ndim == 3:  # grey
        pictures = np.repeat(pictures[..., None], 3, axis=3)
    return f"{NAMES[name]} of {root.resolve()}", pictures


def scaled(pictures: np.ndarray, size: int, crop: str) -> np.ndarray:
    """Crop and scale pictures as files are.

    Args:
        pictures: uint8 [N, height, width, 3].
        size: Height and width of the result.
        crop: `center`, `none`, `celeba`, or a number of pixels.

    Returns:
        uint8 [N, size, size, 3].

    Raises:
        UserError: The crop does not fit the pictures.
    """
    height, width = pictures.shape[1:3]
    try:
        box = crop_box((width, height), crop)
    except RejectedImageError as error:
        raise UserError(f"crop {crop}: {error}") from None
    left, top, right, bottom = box
    return scale(list(pictures[:, top:bottom, left:right]), size)
