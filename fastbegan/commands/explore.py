"""`fastbegan explore`: one HTML page about a run, which opens from its file and needs no network."""

from __future__ import annotations

import html
import math
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tyro.conf import Positional

from ..config import ModelConfig
from ..data.choose import same_images
from ..data.decode import Decoding
from ..data.prepare import load_images
from ..data.source import without_folders
from ..device import pick_device
from ..display import Display
from ..errors import UserError
from ..evaluation.nearest import compare
from ..fields import require_seed
from ..files import atomic, make_folder, read_json
from ..nets.models import Generator
from ..runs.checkpoint import load_latest
from ..runs.folder import RunConfig, RunFolder
from ..runs.sheets import BANDS, COLUMNS, ROWS, banded_sheet, generate, interpolate_latents, sheet_latents
from ..version import __version__
from .explore_page import encode, fact_list, fill, nearest_section, note, training_notes

_CORNERS = 4  # latents of the square
_SAMPLES, _NEIGHBOURS = 12, 5  # generated images with nearest training images, and how many of these
_SHEETS, _POINTS = 40, 2000  # sheets, and points of a curve, at most
_SHEET_TILE = 64  # pixels of an image on a sheet, at most
_CURVES = ("convergence", "loss_real", "loss_fake", "k")


@dataclass(frozen=True)
class _Plan:
    """The amounts that fit on a page, by the size of the images."""

    ends: int
    """Latents with a line between each two."""
    frames: int
    """Images of a line."""
    side: int
    """Rows and columns of the square."""
    room: float
    """Bytes of all picture files."""

    @classmethod
    def of(cls, size: int) -> _Plan:
        if size <= 32:
            return cls(ends=8, frames=25, side=13, room=2.8e6)
        if size <= 64:
            return cls(ends=8, frames=17, side=11, room=2.8e6)
        if size <= 128:
            return cls(ends=8, frames=13, side=9, room=5.7e6)
        return cls(ends=6, frames=9, side=7, room=5.7e6)


@dataclass(frozen=True)
class Explore:
    """Make one HTML page about a run, for a browser: interpolations, sheets, curves, nearest training images."""

    run_folder: Positional[Path]
    """The folder that `fastbegan train` made."""
    out: Path | None = None
    """The file to write, NAME.html. Default: explore.html in the run folder."""
    data: str | None = None
    """The run's training images, where they have moved; as --data of train."""
    seed: int = 0
    """Chooses the latents, as for sample."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def run(self) -> int:
        return explore(self)


def explore(options: Explore) -> int:
    """Write the page of a run and print its path; returns the exit code.

    Generated image i is that of `fastbegan sample` with this seed. The same run and seed give the same bytes. A page
    whose training images are missing says so. Raises UserError for bad options, for a run without a generator, and for
    `data` that cannot be read.
    """
    require_seed(options.seed)
    run = RunFolder(options.run_folder)
    config = run.read_config()
    target = run.path / "explore.html" if options.out is None else options.out
    if target.suffix.lower() not in (".html", ".htm") or target.is_dir():
        raise UserError(f"out is {target}{', a folder' if target.is_dir() else ''}; accepted: a file NAME.html")
    device, _ = pick_device(options.device)
    generator = run.load_generator(device)
    make_folder(target.parent)
    plan = _Plan.of(config.model.size)
    with Display() as display:
        ways, square, samples = _draw(generator, config.model, plan, options.seed, device, display)
        rows, damaged = _metrics(run)
        sheets, lost = _sheets(run, config, 0.38 * plan.room)
        state = _checkpoint(run)
        near, line = _nearest(samples, config, options.data, options.seed, state, 0.14 * plan.room, device, display)
        if line:
            display.say(line)
        values = {
            "ways": {"ends": plan.ends, "frames": plan.frames, "image": encode([ways], 0.36 * plan.room)[0]},
            "square": {"side": plan.side, "image": encode([square], 0.12 * plan.room)[0]},
            "sheets": sheets,
            "curves": _curves(rows),
        }
        name = run.path.resolve().name or str(run.path)
        command = ["fastbegan", "explore", name, "--seed", str(options.seed)]
        command += [] if options.data is None else ["--data", without_folders(options.data)]
        page = fill(
            values,
            title=html.escape(name),
            facts=fact_list([("folder", name), *_facts(run, config, rows, state, sheets)]),
            training=training_notes(rows, sheets, lost, damaged=damaged),
            nearest=near,
            command=html.escape(shlex.join(command)),
            ends=f"0 to {plan.ends - 1}",
            corners=f"{plan.ends} to {plan.ends + _CORNERS - 1}",
            version=html.escape(__version__),
        )
    with atomic(target) as file:
        file.write(page.encode("utf-8", "replace"))  # paths may hold bytes that are no text
    print(target)
    return 0


def _draw(
    generator: Generator, model: ModelConfig, plan: _Plan, seed: int, device: torch.device, display: Display
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """A picture of all lines between latents (a row each), a picture of the square, and samples [12, size, size, 3]."""
    z = sheet_latents(model.latent, seed, max(_SAMPLES, plan.ends + _CORNERS), device)
    pairs = [interpolate_latents(z[[a, b]], plan.frames)[0] for a, b in combinations(range(plan.ends), 2)]
    upper, lower = interpolate_latents(z[plan.ends : plan.ends + _CORNERS], plan.side)[[0, 2]]
    share = torch.linspace(0, 1, plan.side, device=device)[:, None, None]
    square = torch.lerp(upper[None], lower[None], share).flatten(0, 1)  # [side * side, latent], row by row
    images = _generate(generator, torch.cat([*pairs, square, z[:_SAMPLES]]), model.size, display)
    ways, rest = np.split(images, [len(pairs) * plan.frames])
    return _atlas(ways, plan.frames), _atlas(rest[:-_SAMPLES], plan.side), rest[-_SAMPLES:]


def _generate(generator: Generator, z: Tensor, size: int, display: Display) -> np.ndarray:
    batch = max(1, 64 * 64 * 64 // size**2)  # bounds memory
    images = []
    for part in z.split(batch):
        images.append(generate(generator, part, batch))
        display.preparing("drawing images", sum(map(len, images)), len(z))
    return np.concatenate(images)


def _atlas(tiles: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, H, W, 3] as one picture, row by row, without gaps."""
    count, height, width, _ = tiles.shape
    rows = count // columns
    return tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def _evenly(count: int, most: int) -> list[int]:
    """Up to `most` numbers of range(count), evenly spaced; the last is among them."""
    return sorted({round(place) for place in np.linspace(count - 1, 0, min(count, most))})


def _metrics(run: RunFolder) -> tuple[list[dict[str, Any]], bool]:
    """Rows of metrics that have a step, and whether the file is damaged."""
    try:
        rows = run.read_metrics()
    except UserError:
        return [], True
    return [row for row in rows if all(isinstance(row.get(name), int) for name in ("step", "images"))], False


def _curves(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Columns of the rows, thinned out; figures of sheets apart, since few rows have them."""
    if not rows:
        return None

    def columns(rows: list[dict[str, Any]], names: Sequence[str]) -> dict[str, list[float | int | None]]:
        points = [rows[place] for place in _evenly(len(rows), _POINTS)]
        return {name: [_short(row.get(name)) for row in points] for name in ("step", "images", *names)}

    looks = [row for row in rows if "variety" in row]
    return {"rows": columns(rows, _CURVES), "looks": columns(looks, ["sharpness", "variety"]) if looks else None}


def _short(value: object) -> float | int | None:
    if not isinstance(value, float):
        return value if isinstance(value, int) else None
    return float(f"{value:.5g}") if math.isfinite(value) else None  # JSON has no infinity


def _sheets(run: RunFolder, config: RunConfig, room: float) -> tuple[dict[str, Any] | None, int]:
    """The run's sheets without labels and enlargement, and the number of sheets that cannot be read.

    Their training images are stored once, since nearly every run shows the same on all sheets.
    """
    steps = sorted({int(path.stem) for path in run.samples.glob("*.png") if path.stem.isdecimal()})
    geometry, corners = _sheet_geometry(config.model.size)
    chosen, reals, rest, lost = [], [], [], 0
    for step in (steps[place] for place in _evenly(len(steps), _SHEETS)):
        try:
            with Image.open(run.sheet_file(step)) as image:
                sheet = np.asarray(image.convert("RGB"))
            if sheet.shape != geometry:
                raise OSError("no sheet of this run")
        except (OSError, SyntaxError, ValueError, Image.DecompressionBombError):  # what Pillow raises for a bad file
            lost += 1
            continue
        real, *drawn = [_band(sheet, corner, config.model.size) for corner in corners]
        chosen.append(step)
        reals.append(real)
        rest.append(np.concatenate(drawn))
    if not chosen:
        return None, lost
    different = list({real.tobytes(): real for real in reals}.values())
    numbers = {real.tobytes(): number for number, real in enumerate(different)}
    files = encode([*different, *rest], room)
    entries = [
        {"step": step, "images": step * config.train.batch_size, "real": numbers[real.tobytes()], "image": file}
        for step, real, file in zip(chosen, reals, files[len(different) :], strict=True)
    ]
    shape = {"columns": COLUMNS, "rows": ROWS, "names": BANDS, "total": len(steps)}
    return {**shape, "real": files[: len(different)], "list": entries}, lost


def _sheet_geometry(size: int) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Shape of a sheet, and the first row and column of each band, found on a sheet of plain colours."""
    colours = [(band, 255, 0) for band in range(len(BANDS))]
    tile = np.ones((COLUMNS * ROWS, size, size, 3), np.uint8)
    probe = np.asarray(banded_sheet([tile * np.array(colour, np.uint8) for colour in colours]))
    first = [np.argwhere((probe == colour).all(2))[0] for colour in colours]
    return probe.shape, [(int(row), int(column)) for row, column in first]


def _band(sheet: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    """A band of tiles at the size at which the nets drew them, at most _SHEET_TILE pixels each."""
    (top, left), width = corner, sheet.shape[1] - 2 * corner[1]
    zoom = width // (COLUMNS * size)
    band = sheet[top : top + ROWS * size * zoom : zoom, left : left + width : zoom]
    return np.asarray(Image.fromarray(band).reduce(size // _SHEET_TILE)) if size > _SHEET_TILE else band


def _checkpoint(run: RunFolder) -> dict[str, Any]:
    try:
        return load_latest(run.checkpoints, torch.device("cpu")) or {}
    except UserError:  # all damaged: the generator may still be good
        return {}


def _nearest(
    samples: np.ndarray,
    config: RunConfig,
    data: str | None,
    seed: int,
    state: dict[str, Any],
    room: float,
    device: torch.device,
    display: Display,
) -> tuple[str, str | None]:
    """The section on nearest training images as HTML, and a line where their data are missing or others."""
    train = config.train
    stored, source = config.model.size + 2 * train.jitter, train.data if data is None else data
    progress = display.preparing
    try:
        image_set = load_images(
            source,
            stored,
            Decoding(train.crop, train.max_pixels),
            progress,
            max_bad=train.max_bad,
            workers=train.workers,
        )
    except (UserError, OSError) as error:
        if data is not None:
            raise
        line = "no nearest training images, since the run's data cannot be read"
        # the reason holds a path, so it is printed but not put on the page, which may be passed on
        return note(f"{line}; --data names another place"), f"{line}: {error}; --data names another place"
    known = state.get("data") or {"crc32": state.get("data_crc32")}
    current = {"count": len(image_set.images), "crc32": image_set.crc32, "files": image_set.contents}
    same = same_images(known, current)
    line = None if same else "these images are not those that the run was trained on (other pixels)"
    comparison = compare(
        samples, image_set.images, _NEIGHBOURS, flip=train.flip, seed=seed, device=device, progress=progress
    )
    return f"{note(line) if line else ''}{nearest_section(comparison, train, room)}", line


def _facts(
    run: RunFolder, config: RunConfig, rows: list[dict[str, Any]], state: dict[str, Any], sheets: dict[str, Any] | None
) -> list[tuple[str, str]]:
    """Settings and progress of the run; no folders of this machine, since a page may be passed on."""
    model, train = config.model, config.train
    reached = [rows[-1]["step"]] if rows else []
    reached += [state["step"]] if "step" in state else []
    reached += [sheets["list"][-1]["step"]] if sheets else []
    facts = [("data", without_folders(train.data)), ("preset", config.preset)]
    facts += [("images", f"{model.size} px"), ("n", f"{model.filters}"), ("gamma", f"{train.gamma:g}")]
    if reached:
        facts += [("steps", f"{max(reached):,}"), ("images seen", f"{max(reached) * train.batch_size:,}")]
    if "step" in state and max(reached) != state["step"]:
        facts.append(("weights shown", f"of step {state['step']:,}"))
    return [*facts, ("seed of the run", f"{train.seed}"), ("fastbegan", _version_of(run))]


def _version_of(run: RunFolder) -> str:
    stored = str(read_json(run.config_file).get("fastbegan", "not known"))
    return stored if stored == __version__ else f"{stored}; this page: {__version__}"
