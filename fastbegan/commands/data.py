"""`fastbegan data`: pack a source, check a source, show a pack."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tyro.conf import Positional

from ..data.decode import MAX_PIXELS, Decoding
from ..data.pack import DamagedPackError, read_pack
from ..data.prepare import load_catalogue, make_pack
from ..display import Display
from ..errors import UserError
from ..files import printable
from ..runs.sheets import save_png

_SHOWN = 8  # rows and columns of a contact sheet


@dataclass(frozen=True)
class DataPack:
    """Decode images once into one file that training maps into memory. An interrupted pack is resumed."""

    source: Positional[str]
    """As --data of train: a folder, an archive, faces:COUNT, portraits:COUNT, cifar10:ROOT, fashion-mnist:ROOT."""
    out: Positional[Path]
    """The file to write, NAME.pack; NAME.rejected.txt beside it lists files broken, left out, converted or enlarged."""
    size: int = 64
    """Height and width of the packed images: the nets' size, plus 2 * J where train gets --jitter J."""
    crop: str = "center"
    """center (largest square), none (stretch), pixels (128), or celeba (the face in CelebA's aligned images)."""
    max_pixels: int = MAX_PIXELS
    """Pixels of the largest file that is decoded."""
    max_bad: float = 1.0
    """Percentage of broken files above which nothing is packed."""
    workers: int | None = None
    """Processes that decode. Default: one per core."""

    def run(self) -> int:
        return pack(self)


@dataclass(frozen=True)
class DataCheck:
    """Decode every image of a source and name the broken ones; exit code 1 if there are any, or no good one."""

    source: Positional[str]
    """A folder or an archive."""
    size: int = 64
    """Height and width of the images that they are to become: smaller ones are counted."""
    crop: str = "center"
    """As for pack."""
    max_pixels: int = MAX_PIXELS
    """As for pack."""
    workers: int | None = None
    """Processes that decode. Default: one per core."""

    def run(self) -> int:
        return check(self)


@dataclass(frozen=True)
class DataInfo:
    """Show what a pack holds, and draw a contact sheet of it."""

    pack: Positional[Path]
    """The file."""
    sheet: Path | None = None
    """The sheet's file. Default: NAME.sheet.png beside NAME.pack."""

    def run(self) -> int:
        return info(self)


def pack(options: DataPack) -> int:
    """Write a pack; returns the exit code. Raises UserError for bad options and bad data."""
    _check(options)
    if not 0 <= options.max_bad <= 100:
        raise UserError(f"max_bad is {options.max_bad}; accepted: 0 to 100")
    if options.out.suffix != ".pack":
        raise UserError(f"out is {options.out}; accepted: a name that ends with .pack")
    with Display() as display:
        images = make_pack(
            options.source,
            options.out,
            options.size,
            Decoding(options.crop, options.max_pixels),
            display.preparing,
            max_bad=options.max_bad,
            workers=options.workers,
        )
        display.say("\n  ".join((images.description, *images.remarks)))
        display.say(f"  train on it: fastbegan train --size {options.size} --data {options.out}")
        rejected = options.out.with_suffix(".rejected.txt")
        if rejected.exists() and rejected.stat().st_size:
            display.say(f"  all of them by name: {rejected}")
    return 0


def check(options: DataCheck) -> int:
    """Decode all files of a source and print the broken ones; returns 1 if there are any, or no good one.

    Raises UserError.
    """
    _check(options)
    with Display() as display:
        catalogue = load_catalogue(
            options.source,
            options.size,
            Decoding(options.crop, options.max_pixels),
            display.preparing,
            max_bad=100.0,
            workers=options.workers,
            again=True,
        )
        for name, reason in catalogue.broken:
            display.say(printable(f"broken  {name}: {reason}"))
        display.say("\n  ".join((f"{catalogue.description}, {len(catalogue.broken):,} broken", *catalogue.remarks)))
    return 1 if catalogue.broken or not len(catalogue.seen) else 0


def _check(options: DataPack | DataCheck) -> None:
    for name, value in (("size", options.size), ("workers", options.workers)):
        if value is not None and value < 1:
            raise UserError(f"{name} is {value}; accepted: whole numbers from 1")


def info(options: DataInfo) -> int:
    """Print the header of a pack and draw a contact sheet; returns the exit code. Raises UserError."""
    path = options.pack
    if not path.is_file():
        raise UserError(f"{path} {'is no file' if path.exists() else 'does not exist'}; accepted: a .pack file")
    try:
        images, header = read_pack(path, check_below=sys.maxsize)
    except DamagedPackError as error:
        raise UserError(str(error)) from None
    print(f"{header.source}: {header.count:,} images of {header.size} px, {path.stat().st_size / 1e6:,.1f} MB")
    print(f"checksum {header.crc32:08x}, made from {header.made_from or 'an earlier version'}")
    if not header.count:
        return 0
    count = min(header.count, _SHOWN * _SHOWN)
    chosen = np.linspace(0, header.count - 1, count).astype(np.int64)
    columns = min(count, _SHOWN)
    rows = -(-count // columns)
    page = np.full((rows * columns, header.size, header.size, 3), 255, np.uint8)
    page[:count] = images[chosen]
    grid = page.reshape(rows, columns, header.size, header.size, 3).swapaxes(1, 2)
    target = path.with_suffix(".sheet.png") if options.sheet is None else options.sheet
    save_png(target, grid.reshape(rows * header.size, columns * header.size, 3))
    print(f"contact sheet: {target}")
    return 0
