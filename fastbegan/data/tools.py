"""`fastbegan data`: pack a source, check it, look into a pack."""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np

from ..display import Display
from ..errors import UserError
from ..runs.sheets import save_png
from .pack import DamagedPackError, read_pack
from .prepare import load_catalogue, make_pack

_SHOWN = 8  # rows and columns of a contact sheet


def pack(data: str, out: Path, *, size: int, crop: str, max_bad: float, workers: int | None) -> int:
    """Write a pack of `data` to `out`; returns the exit code. Raises UserError."""
    if size < 1:
        raise UserError(f"size is {size}; accepted: whole numbers from 1")
    _check_workers(workers)
    if not 0 <= max_bad <= 100:
        raise UserError(f"max_bad is {max_bad}; accepted: 0 to 100")
    if out.suffix != ".pack":
        raise UserError(f"out is {out}; accepted: a name that ends with .pack")
    with Display() as display:
        found = make_pack(data, out, size, crop, display.preparing, max_bad=max_bad, workers=workers)
        display.say(found.description)
        display.say(f"  train on it: fastbegan train --size {size} --data {out}")
        rejected = out.with_suffix(".rejected.txt")
        if rejected.exists() and rejected.stat().st_size:
            display.say(f"  rejected, left out and converted: {rejected}")
    return 0


def check(data: str, *, crop: str, workers: int | None) -> int:
    """Decode all of `data` and name what is broken; returns 1 if something is. Raises UserError."""
    _check_workers(workers)
    with Display() as display:
        found = load_catalogue(data, crop, display.preparing, max_bad=100.0, workers=workers, again=True)
        for name, reason in found.broken:
            display.say(f"broken  {name}: {reason}")
        converted = int(found.seen[:, 2].sum())
        display.say(
            f"{found.description}; {len(found.broken):,} broken, {converted:,} with colours or rotation converted"
        )
    return 1 if found.broken else 0


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise UserError(f"workers is {workers}; accepted: whole numbers from 1")


def info(path: Path, *, sheet: Path | None) -> int:
    """Print what a pack holds and draw a contact sheet of it; returns the exit code. Raises UserError."""
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
    target = path.with_suffix(".sheet.png") if sheet is None else sheet
    save_png(target, grid.reshape(rows * header.size, columns * header.size, 3))
    print(f"contact sheet: {target}")
    return 0
