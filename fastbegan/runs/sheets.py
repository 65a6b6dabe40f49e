"""Pictures: sample sheets, strips of interpolations, and animations."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn

from .. import counter
from ..files import atomic
from .appearance import Appearance, compare

BANDS = ("real", "real, reconstructed", "generated", "generated, reconstructed")
COLUMNS, ROWS = 10, 2  # tiles in each band of a training sheet
_TILE = 64  # height in pixels to which smaller images are enlarged
_MARGIN, _LABEL = 6, 18


def to_uint8(images: Tensor) -> np.ndarray:
    """[N, 3, H, W] in [-1, 1] (clipped) -> uint8 [N, H, W, 3]."""
    pixels = images.detach().float().clamp(-1, 1).add(1).mul(127.5).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).cpu().numpy()


def grid(images: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, H, W, 3] -> one picture, row by row. Small images are enlarged; missing tiles are white."""
    count, height, width, _ = images.shape
    columns = max(1, min(columns, count))
    rows = -(-count // columns)
    tiles = np.full((rows * columns, height, width, 3), 255, np.uint8)
    tiles[:count] = images
    picture = tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)
    zoom = max(1, _TILE // height)
    return picture.repeat(zoom, 0).repeat(zoom, 1)


def save_png(path: Path, picture: np.ndarray | Image.Image) -> None:
    """Write a PNG atomically."""
    image = Image.fromarray(picture) if isinstance(picture, np.ndarray) else picture
    with atomic(path) as file:
        image.save(file, "PNG")


_ANIMATION_FRAMES = 60


def save_animation(path: Path, sheets: Sequence[Path]) -> None:
    """The generated images of training sheets, in this order, as a GIF; nothing for no sheets."""
    stride = max(1, -(-len(sheets) // _ANIMATION_FRAMES))
    frames = []
    for sheet_path in sheets[::-1][::stride][::-1]:  # evenly spaced, the newest included
        with Image.open(sheet_path) as sheet:
            frames.append(generated_band(sheet.convert("RGB")))
    if frames:
        save_gif(path, frames, milliseconds=250)


def save_gif(path: Path, frames: Sequence[np.ndarray | Image.Image], milliseconds: int) -> None:
    """Write a looping GIF atomically; the last frame stays a second longer."""
    images = [Image.fromarray(frame) if isinstance(frame, np.ndarray) else frame for frame in frames]
    # one palette for all frames: with one each, colours would flicker
    every = np.concatenate([np.asarray(image)[::2, ::2] for image in images])
    palette = Image.fromarray(every).quantize(colors=255, method=Image.Quantize.MEDIANCUT)
    indexed = [image.quantize(palette=palette, dither=Image.Dither.NONE) for image in images]
    durations = [milliseconds] * (len(indexed) - 1) + [milliseconds + 1000]
    buffer = io.BytesIO()
    indexed[0].save(buffer, "GIF", save_all=True, append_images=indexed[1:], duration=durations, loop=0)
    with atomic(path) as file:
        file.write(buffer.getvalue())


def banded_sheet(bands: Sequence[np.ndarray], caption: str = "") -> Image.Image:
    """Four bands of tiles (BANDS), each under its name; `caption` follows that of the generated images."""
    pictures = [grid(band, COLUMNS) for band in bands]
    height, width = pictures[0].shape[:2]
    sheet = Image.new("RGB", (width + 2 * _MARGIN, len(pictures) * (height + _LABEL) + _MARGIN), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for number, (name, picture) in enumerate(zip(BANDS, pictures, strict=True)):
        top = number * (height + _LABEL)
        text = f"{name}: {caption}" if caption and name == "generated" else name
        draw.text((_MARGIN, top + 3), text, fill="black", font=font)
        sheet.paste(Image.fromarray(picture), (_MARGIN, top + _LABEL))
    return sheet


def generated_band(sheet: Image.Image) -> Image.Image:
    """The band of generated images of a `banded_sheet`."""
    step = (sheet.height - _MARGIN) // len(BANDS)
    top = BANDS.index("generated") * step + _LABEL
    return sheet.crop((_MARGIN, top, sheet.width - _MARGIN, top + step - _LABEL))


@torch.no_grad()
def training_sheet(
    generator: nn.Module, discriminator: nn.Module, real: Tensor, z: Tensor
) -> tuple[Image.Image, Appearance]:
    """A sheet of real images, G(z) and D's reconstructions of both, and the figures of G(z).

    Args:
        generator: Maps `z` to images.
        discriminator: Reconstructs images.
        real: [N, 3, H, W] in [-1, 1].
        z: [N, latent].

    Returns:
        The sheet, and how the G(z) look beside the real images.
    """
    fake = generator(z)
    figures = compare(fake, real)
    bands = (real, discriminator(real), fake, discriminator(fake))
    caption = f"sharpness {figures.sharpness:.2f}, variety {figures.variety:.2f}"
    return banded_sheet([to_uint8(band) for band in bands], caption), figures


def sheet_latents(latent: int, seed: int, count: int, device: torch.device | str = "cpu") -> Tensor:
    """The z of all sheets and of `fastbegan sample`, fixed by the seed: float32 [count, latent] in [-1, 1)."""
    return counter.latents(seed, counter.SHEET, 0, count, latent, device)


@torch.no_grad()
def generate(generator: nn.Module, z: Tensor, batch: int = 64) -> np.ndarray:
    """G(z) as uint8 [N, size, size, 3], a batch at a time."""
    return np.concatenate([to_uint8(generator(part)) for part in z.split(batch)])


def interpolate_latents(z: Tensor, frames: int) -> Tensor:
    """Points on the lines between consecutive rows of z [N, latent]: [N - 1, frames, latent], with both ends."""
    weights = torch.linspace(0, 1, frames, device=z.device)[None, :, None]
    return torch.lerp(z[:-1, None], z[1:, None], weights)
