"""`fastbegan explore`: one HTML page about a run, which opens from its file and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import math
import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tyro.conf import Positional

from ..config import ModelConfig, TrainConfig
from ..data.prepare import ImageSet, load_images
from ..data.source import without_folders
from ..device import pick_device
from ..display import Display
from ..errors import UserError
from ..evaluation.nearest import Comparison, Neighbour, compare
from ..fields import require_seed
from ..files import atomic, make_folder, read_json
from ..nets.models import Generator
from ..runs.checkpoint import load_latest
from ..runs.folder import RunConfig, RunFolder
from ..runs.sheets import BANDS, COLUMNS, ROWS, banded_sheet, generate, interpolate_latents, sheet_latents
from ..version import __version__

_CORNERS = 4
_SAMPLES, _NEIGHBOURS = 12, 5  # generated images that are compared with training images, neighbours of each
_SHEETS, _POINTS = 40, 2000  # at most
_SHEET_TILE = 64  # pixels at most
_CURVES = ("convergence", "loss_real", "loss_fake", "k")
_QUALITIES = (95, 90, 85, 80, 70, 60, 50)
_LONG = 16  # characters of a fact that gets a line of its own


@dataclass(frozen=True)
class _Plan:
    """What fits on a page for a size of images: counts, and bytes of picture files."""

    ends: int
    frames: int
    side: int
    room: float

    @classmethod
    def of(cls, size: int) -> _Plan:
        if size <= 32:
            return cls(ends=8, frames=25, side=13, room=2.8e6)
        if size <= 64:
            return cls(ends=8, frames=17, side=11, room=2.8e6)
        if size <= 128:
            return cls(ends=8, frames=13, side=9, room=5.7e6)
        return cls(ends=6, frames=9, side=7, room=5.7e6)


class _Page(Template):
    delimiter = "@@"  # the page's script has dollars of its own


@dataclass(frozen=True)
class Explore:
    """Make one HTML page of a run, to look into it in a browser: interpolations, sheets, curves, nearest images."""

    run_folder: Positional[Path]
    """The folder that `fastbegan train` made."""
    out: Path | None = None
    """The file to write, NAME.html. Default: explore.html in the run folder."""
    data: str | None = None
    """Where the images are that the run was trained on, where they have moved; as --data of train."""
    seed: int = 0
    """Which latents, as for sample."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def run(self) -> int:
        return explore(self)


def explore(options: Explore) -> int:
    """Write a page about a run to `out`, by default `explore.html` in its folder, and print its path; returns 0.

    Generated image i is that of `fastbegan sample` with this seed. The same run and seed give the same bytes. Images
    are looked for in `data`, by default where the run had them; where they are not, the page says so. Raises UserError
    for bad input, among it no generator yet, and a given `data` that cannot be read.
    """
    require_seed(options.seed)
    run = RunFolder(options.run_folder)
    config = run.read_config()
    target = run.path / "explore.html" if options.out is None else options.out
    if target.suffix.lower() not in (".html", ".htm") or target.is_dir():
        raise UserError(f"out is {target}{', a folder' if target.is_dir() else ''}; accepted: a file NAME.html")
    place = pick_device(options.device)[0]
    generator = run.load_generator(place)
    make_folder(target.parent)
    plan = _Plan.of(config.model.size)
    with Display() as display:
        ways, square, samples = _draw(generator, config.model, plan, options.seed, place, display)
        rows, damaged = _metrics(run)
        sheets, lost = _sheets(run, config, 0.38 * plan.room)
        state = _checkpoint(run)
        near, line = _nearest(samples, config, options.data, options.seed, state, 0.14 * plan.room, place, display)
        if line:
            display.say(line)
        values = {
            "ways": {"ends": plan.ends, "frames": plan.frames, "image": _encoded([ways], 0.36 * plan.room)[0]},
            "square": {"side": plan.side, "image": _encoded([square], 0.12 * plan.room)[0]},
            "sheets": sheets,
            "curves": _curves(rows),
        }
        name = run.path.resolve().name or str(run.path)
        command = ["fastbegan", "explore", name, "--seed", str(options.seed)]
        command += [] if options.data is None else ["--data", without_folders(options.data)]
        page = _fill(
            values,
            title=html.escape(name),
            facts=_listed([("folder", name), *_facts(run, config, rows, state, sheets)]),
            training=_training_note(rows, sheets, lost, damaged=damaged),
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
    generator: Generator, model: ModelConfig, plan: _Plan, seed: int, place: torch.device, display: Display
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pictures of all ways (a row each) and of the square, and the samples, uint8 [12, size, size, 3]."""
    z = sheet_latents(model.latent, seed, max(_SAMPLES, plan.ends + _CORNERS), place)
    pairs = [interpolate_latents(z[[a, b]], plan.frames)[0] for a, b in combinations(range(plan.ends), 2)]
    upper, lower = interpolate_latents(z[plan.ends : plan.ends + _CORNERS], plan.side)[[0, 2]]
    share = torch.linspace(0, 1, plan.side, device=place)[:, None, None]
    square = torch.lerp(upper[None], lower[None], share).flatten(0, 1)  # [side * side, latent], row by row
    images = _generate(generator, torch.cat([*pairs, square, z[:_SAMPLES]]), model.size, display)
    ways, rest = np.split(images, [len(pairs) * plan.frames])
    return _atlas(ways, plan.frames), _atlas(rest[:-_SAMPLES], plan.side), rest[-_SAMPLES:]


def _generate(generator: Generator, z: Tensor, size: int, display: Display) -> np.ndarray:
    batch = max(1, 64 * 64 * 64 // size**2)  # a CPU's memory
    images = []
    for part in z.split(batch):
        images.append(generate(generator, part, batch))
        display.preparing("drawing images", sum(map(len, images)), len(z))
    return np.concatenate(images)


def _atlas(tiles: np.ndarray, columns: int) -> np.ndarray:
    """uint8 [N, H, W, 3] -> one picture, row by row, as it is."""
    count, height, width, _ = tiles.shape
    rows = count // columns
    return tiles.reshape(rows, columns, height, width, 3).swapaxes(1, 2).reshape(rows * height, columns * width, 3)


def _encoded(pictures: Sequence[np.ndarray], room: float) -> list[str]:
    """data: addresses of pictures: PNG where all of them fit into `room` bytes, else JPEG, the best that fits."""
    images, kind = [Image.fromarray(picture) for picture in pictures], "png"
    files = _files(images, room, "PNG")
    while files is None:
        kind = "jpeg"
        tries = (_files(images, room, "JPEG", quality=quality, subsampling=0) for quality in _QUALITIES)
        files = next((found for found in tries if found is not None), None)
        images = [image.reduce(2) for image in images]
    return [f"data:image/{kind};base64,{base64.b64encode(file).decode()}" for file in files]


def _files(images: Sequence[Image.Image], room: float, kind: str, **options: Any) -> list[bytes] | None:
    """The pictures as files, None as soon as they do not fit."""
    files = []
    for image in images:
        image.save(buffer := io.BytesIO(), kind, **options)
        files.append(buffer.getvalue())
        room -= len(files[-1])
        if room < 0:
            return None
    return files


def _evenly(count: int, most: int) -> list[int]:
    """Up to `most` of range(count), evenly spaced, the last always among them."""
    return sorted({round(place) for place in np.linspace(count - 1, 0, min(count, most))})


def _metrics(run: RunFolder) -> tuple[list[dict[str, Any]], bool]:
    """Rows that say where they belong, and whether the file is damaged."""
    try:
        rows = run.read_metrics()
    except UserError:
        return [], True
    return [row for row in rows if all(isinstance(row.get(name), int) for name in ("step", "images"))], False


def _curves(rows: list[dict[str, Any]]) -> dict[str, Any] | None:
    """Columns of the rows, thinned out; diversity by itself, since few rows have it."""
    if not rows:
        return None

    def columns(some: list[dict[str, Any]], names: Sequence[str]) -> dict[str, list[float | int | None]]:
        some = [some[place] for place in _evenly(len(some), _POINTS)]
        return {name: [_short(row.get(name)) for row in some] for name in ("step", "images", *names)}

    spread = [row for row in rows if "diversity" in row]
    return {"rows": columns(rows, _CURVES), "diversity": columns(spread, ["diversity"]) if spread else None}


def _short(value: object) -> float | int | None:
    if not isinstance(value, float):
        return value if isinstance(value, int) else None
    return float(f"{value:.5g}") if math.isfinite(value) else None  # JSON has no other numbers


def _sheets(run: RunFolder, config: RunConfig, room: float) -> tuple[dict[str, Any] | None, int]:
    """Sheets of the run without labels and enlargement, and how many could not be read.

    Training images are in nearly every run the same on all sheets, so they are kept apart.
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
        real, *others = [_band(sheet, corner, config.model.size) for corner in corners]
        chosen.append(step)
        reals.append(real)
        rest.append(np.concatenate(others))
    if not chosen:
        return None, lost
    different = list({real.tobytes(): real for real in reals}.values())
    numbers = {real.tobytes(): number for number, real in enumerate(different)}
    files = _encoded([*different, *rest], room)
    every = [
        {"step": step, "images": step * config.train.batch_size, "real": numbers[real.tobytes()], "image": file}
        for step, real, file in zip(chosen, reals, files[len(different) :], strict=True)
    ]
    shape = {"columns": COLUMNS, "rows": ROWS, "names": BANDS, "total": len(steps)}
    return {**shape, "real": files[: len(different)], "list": every}, lost


def _sheet_geometry(size: int) -> tuple[tuple[int, ...], list[tuple[int, int]]]:
    """Shape of a sheet, and where its bands begin (row, column): seen on a sheet of plain colours."""
    colours = [(band, 255, 0) for band in range(len(BANDS))]
    tile = np.ones((COLUMNS * ROWS, size, size, 3), np.uint8)
    probe = np.asarray(banded_sheet([tile * np.array(colour, np.uint8) for colour in colours]))
    first = [np.argwhere((probe == colour).all(2))[0] for colour in colours]
    return probe.shape, [(int(row), int(column)) for row, column in first]


def _band(sheet: np.ndarray, corner: tuple[int, int], size: int) -> np.ndarray:
    """One band of tiles, as small as the nets drew them, and not larger than a page shows them."""
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
    place: torch.device,
    display: Display,
) -> tuple[str, str | None]:
    """The section about nearest training images as HTML, and a line where something is to be said about them."""
    train, size = config.train, config.model.size
    try:
        found = load_images(
            train.data if data is None else data, size + 2 * train.jitter, train.crop, display.preparing,
            max_bad=train.max_bad, workers=train.workers,
        )  # fmt: skip
    except (UserError, OSError) as error:
        if data is not None:
            raise
        line = "no nearest training images, since the run's data cannot be read"
        # the page may be passed on: what is wrong, with its path, is only printed
        return _note(f"{line}; --data names another place"), f"{line}: {error}; --data names another place"
    line = None if _same(found, state) else "these images are not those that the run was trained on (other pixels)"
    seen = compare(
        samples, found.images, _NEIGHBOURS, flip=train.flip, seed=seed, device=place, progress=display.preparing
    )
    files = iter(_encoded([picture for row in seen.pictures for picture in row], room))
    items = [_row(number, row, [next(files) for _ in range(1 + len(row))]) for number, row in enumerate(seen.rows)]
    words = _words(seen, train)
    return f'{_note(line) if line else ""}{words}<ol class="nearest">{"".join(items)}</ol>', line


def _same(found: ImageSet, state: dict[str, Any]) -> bool:
    """Whether these are the images that the checkpoint knows, as far as it does."""
    known = state.get("data") or {"crc32": state.get("data_crc32")}
    here = {"count": len(found.images), "crc32": found.crc32, "files": found.contents}
    return all(None in (value, here.get(name)) or value == here.get(name) for name, value in known.items())


def _words(seen: Comparison, train: TrainConfig) -> str:
    mirrored = ", mirrored ones (⇄) among them, since training mirrors half" if train.flip else ""
    middle = (
        f"; the middle of each counts, since training shifts by up to {train.jitter} pixels" if train.jitter else ""
    )
    text = (
        f'<p class="lede">Has G learned its training images by heart? Beside each of {len(seen.rows)} generated images '
        f"stand the nearest of all {seen.total:,} training images{mirrored}{middle}. The number is their distance, the "
        "root mean square difference of pixel values, which go from 0 to 255: copies would have a distance near 0. "
        "Smooth images are nearer to everything than sharp ones, and a shifted copy is not near: look as well.</p>"
    )
    if seen.between_training is None or seen.to_training is None:
        return text
    return (
        f"{text}<p>As a yardstick: a training image is <strong>{seen.between_training:.1f}</strong> from the nearest "
        f"other one (median, measured on {seen.measured:,} of them). These generated images are "
        f"<strong>{seen.to_training:.1f}</strong> from theirs.</p>"
    )


def _row(number: int, row: list[Neighbour], files: list[str]) -> str:
    tiles = [(f"generated image {number}", f"image {number}")]
    for one in row:
        turned, mark = (", mirrored", " ⇄") if one.mirrored else ("", "")
        tiles.append((f"training image {one.number}{turned}, distance {one.distance:.1f}", f"{one.distance:.1f}{mark}"))
    figures = [
        f'<figure><img src="{file}" alt="{alt}" title="{alt}"><figcaption>{words}</figcaption></figure>'
        for file, (alt, words) in zip(files, tiles, strict=True)
    ]
    return f"<li>{''.join(figures)}</li>"


def _note(line: str) -> str:
    return f'<p class="note">{html.escape(line[0].upper() + line[1:])}.</p>'


def _facts(
    run: RunFolder, config: RunConfig, rows: list[dict[str, Any]], state: dict[str, Any], sheets: dict[str, Any] | None
) -> list[tuple[str, str]]:
    """What the run is and how far it came; no folders of this machine, for a page may be passed on."""
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


def _listed(facts: list[tuple[str, str]]) -> str:
    items = []
    for name, value in facts:
        kind = ' class="wide"' if len(value) > _LONG else ""
        items.append(f"<div{kind}><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>")
    return "".join(items)


def _training_note(rows: list[dict[str, Any]], sheets: dict[str, Any] | None, lost: int, *, damaged: bool) -> str:
    notes = [] if sheets or lost else ["there are no sheets yet: samples/ of the run holds none"]
    notes += [f"{lost} of the sheets could not be read and {'is' if lost == 1 else 'are'} left out"] if lost else []
    problem = "is damaged" if damaged else "has no rows yet"
    notes += [] if rows else [f"there are no curves: metrics.jsonl of the run {problem}"]
    return "".join(map(_note, notes))


def _fill(values: dict[str, Any], **texts: str) -> str:
    """The template with its parts; its policy allows this very style and script, data: images, and nothing else."""
    template = Path(__file__).with_suffix(".html").read_text(encoding="utf-8")
    policy = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for kind in ("style", "script"):
        found = re.search(rf"<{kind}>(.*?)</{kind}>", template, re.DOTALL)
        assert found is not None and "@@" not in found[1]
        digest = base64.b64encode(hashlib.sha256(found[1].encode()).digest()).decode()
        policy.append(f"{kind}-src 'sha256-{digest}'")
    data = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # "</script>" ends a script wherever it stands
        data = data.replace(character, f"\\u{ord(character):04x}")
    return _Page(template).substitute(texts, data=data, policy="; ".join(policy))
