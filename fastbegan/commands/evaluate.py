"""`fastbegan evaluate`: scores of a generator's images, or of any images, against a data set."""

from __future__ import annotations

from dataclasses import dataclass, replace
from json import dumps
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from ..config import TrainConfig
from ..counter import chosen
from ..data.decode import Decoding
from ..data.prepare import Progress, load_images
from ..data.scale import scale
from ..data.styles import style_of
from ..device import pick_device
from ..display import Display
from ..errors import UserError
from ..evaluation.extractors import open_extractor
from ..evaluation.scores import LEAST, SCATTERED, Yardstick, names
from ..fields import require_seed
from ..files import printable
from ..runs import sheets
from ..runs.appearance import SHARPNESS, VARIETY
from ..runs.folder import RunConfig, RunFolder

ENOUGH = 10_000
"""Images per side below which a warning says that figures are biased."""
_FILTER = "bilinear, antialiased"  # of data.scale
_BETTER = {
    "frechet_distance": "lower",
    "kernel_distance": "lower",
    "inception_score": "higher",
    "precision": "higher",
    "recall": "higher",
    "sharpness": "near 1",
    "variety": "near 1",
    "diversity": "near the data set's",
    "diversity_against": "",
}


@dataclass(frozen=True)
class Evaluate:
    """Score images, a generator's or files, against a data set: Frechet and kernel distance, inception score,
    precision, recall, sharpness, variety."""

    images: Positional[str]
    """A run folder, whose averaged generator draws them, or images as train takes them for data."""
    against: str | None = None
    """The data set, as train takes it for data. Default: the run's."""
    count: int = 5000
    """Images per side, or all that there are. Below 10,000 the Frechet distance is clearly too high."""
    size: int | None = None
    """Height and width to which both sides are scaled. Default: the run's, else 64."""
    crop: str | None = None
    """As for train. Default: the run's, else center."""
    max_pixels: int | None = None
    """As for train. Default: the run's, else 64,000,000."""
    max_bad: float | None = None
    """Percentage of broken files above which a set is refused. Default: the run's, else 1."""
    extractor: Literal["efficientnet-lite0", "inception"] = "efficientnet-lite0"
    """The net whose features are compared. inception gives the usual FID and needs --inception."""
    inception: Path | None = None
    """torch-fidelity's file of Inception's weights, weights-inception-2015-12-05-6726825d.pth; its hash is checked."""
    seed: int = 0
    """Chooses the latents, and the images of a set that has more than --count."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print only JSON."""

    def run(self) -> int:
        return evaluate(self)


@dataclass(frozen=True)
class _Selection:
    """The choice and the size of images that both sides share."""

    count: int
    size: int
    decoding: Decoding
    max_bad: float
    seed: int


@dataclass(frozen=True)
class _Side:
    """The images of one side."""

    pixels: np.ndarray
    """uint8 [N, size, size, 3]."""
    source: str
    """In words."""
    scaled: str
    """The way to this size, in words."""
    crc32: int | None = None
    """Checksum of the set that they come from; None for drawn images."""
    total: int = 0
    """Images of that set."""
    remarks: tuple[str, ...] = ()
    """Lines about what was left out, converted or enlarged."""


def evaluate(options: Evaluate) -> int:
    """Score images against a data set and print the figures; returns the exit code. Raises UserError."""
    require_seed(options.seed)
    for name, value, least in (("count", options.count, LEAST), ("size", options.size, 1)):
        if value is not None and value < least:
            raise UserError(f"{name} is {value}; accepted: whole numbers from {least}")
    run = RunFolder(Path(options.images))
    config = run.read_config() if run.exists() else None
    against = options.against or config.train.data if config else options.against
    if against is None:
        raise UserError(
            f"against is missing, and {options.images!r} is no run folder that would say it; give --against DATA"
        )
    device, _ = pick_device(options.device)
    extractor = open_extractor(options.extractor, options.inception, device)
    train = TrainConfig() if config is None else config.train
    given = {name: value for name in ("crop", "max_pixels", "max_bad") if (value := getattr(options, name)) is not None}
    train = replace(train, **given)
    size, jitter = options.size, 0
    if config is not None:
        size = config.model.size if size is None else size
        jitter = config.train.jitter if size == config.model.size else 0
    decoding = Decoding(train.crop, train.max_pixels)
    selection = _Selection(options.count, 64 if size is None else size, decoding, train.max_bad, options.seed)
    with Display(quiet=options.json) as display:
        data_set = _load(against, selection, display.preparing, jitter=jitter)
        if config is None:
            side = _load(options.images, selection, display.preparing, from_end=True)
        else:
            side = _draw(run, config, selection, device, display.preparing)
        figures = Yardstick(data_set.pixels, extractor=extractor, progress=display.preparing).score(side.pixels)
    facts = {
        "images": side.source,
        "against": data_set.source,
        "size": f"{selection.size} px; images: {side.scaled}; data set: {data_set.scaled}",
        "extractor": f"{extractor.weights}; it scales what it sees itself: {extractor.resize}",
        "sharpness": SHARPNESS,
        "variety": VARIETY,
        "diversity": f"mean L1 distance between images in [-1, 1], {SCATTERED} of a side at most",
    }
    facts |= {
        f"  {name}": "; ".join(images.remarks)
        for name, images in (("images", side), ("against", data_set))
        if images.remarks
    }
    cautions = _warnings(side, data_set)
    if options.json:
        print(dumps({**figures, "names": names(options.extractor), "about": facts, "warnings": cautions}, indent=2))
    else:
        _show(figures, facts, cautions)
    return 0


def _draw(run: RunFolder, config: RunConfig, selection: _Selection, device: torch.device, progress: Progress) -> _Side:
    """Images of the averaged generator from the latents of `fastbegan sample`."""
    generator = run.load_generator(device)
    count, seed = selection.count, selection.seed
    z = sheets.sheet_latents(config.model.latent, seed, count, device)
    drawn: list[np.ndarray] = []
    for part in z.split(64):
        drawn.append(sheets.generate(generator, part))
        progress("drawing images", sum(map(len, drawn)), count)
    pixels, scaled = np.concatenate(drawn), f"drawn at {config.model.size} px"
    if selection.size != config.model.size:
        pixels, scaled = scale(list(pixels), selection.size), f"{scaled}, then {_FILTER}"
    return _Side(pixels, f"{count:,} drawn by {run.path} (averaged generator, seed {seed})", scaled)


def _load(
    data: str,
    selection: _Selection,
    progress: Progress,
    *,
    jitter: int = 0,
    from_end: bool = False,
) -> _Side:
    """The chosen images of `data`, or all of them. With `jitter`, the middle of what training shifts."""
    size, count, stored = selection.size, selection.count, selection.size + 2 * jitter
    image_set = load_images(data, stored, selection.decoding, progress, max_bad=selection.max_bad)
    if (total := len(image_set.images)) < LEAST:
        raise UserError(f"data {data!r} has only {total} images; accepted here: from {LEAST}")
    # `from_end` takes other images than the side that does not, where both sides are the same set
    pixels = image_set.images[chosen(total, count, selection.seed, from_end=from_end)]
    pixels = pixels[:, jitter : jitter + size, jitter : jitter + size]
    number = f"all {total:,} there are ({count:,} were asked for)" if total < count else f"{len(pixels):,}"
    if style_of(data):
        scaled = f"drawn at {stored} px"
    elif Path(data).suffix == ".pack":
        scaled = f"as packed, at {stored} px ({_FILTER})"
    else:
        scaled = f"{_FILTER}, crop {selection.decoding.crop}, as for packs" + (f", at {stored} px" if jitter else "")
    scaled += ", the middle of it" if jitter else ""
    return _Side(pixels, f"{number} of: {image_set.description}", scaled, image_set.crc32, total, image_set.remarks)


def _warnings(side: _Side, data_set: _Side) -> list[str]:
    """Reasons for which the figures may mislead."""
    cautions, counts = [], (len(side.pixels), len(data_set.pixels))
    if min(counts) < ENOUGH:
        cautions.append(
            f"fewer than {ENOUGH:,} images on a side: the Frechet distance comes out too high, the inception score too "
            "low; compare only with figures of as many images"
        )
    if counts[0] != counts[1]:
        cautions.append(
            f"the sides have different counts, {counts[0]:,} and {counts[1]:,}; compare only with such figures"
        )
    if side.crc32 is not None and (side.crc32, side.total) == (data_set.crc32, data_set.total):
        shared = max(0, sum(counts) - side.total)
        cautions.append(f"both sides are the same set and share {shared:,} images")
    return cautions


def _show(figures: dict[str, Any], facts: dict[str, str], cautions: list[str]) -> None:
    counts = f"{figures['count']:,} images against {figures['count_against']:,}"
    table = Table("figure", "value", "better is", title=counts)
    table.columns[1].justify = "right"
    for key, name in names(figures["extractor"]).items():
        spread = f" ± {figures['inception_score_std']:.2g}" if key == "inception_score" else ""
        table.add_row(name, f"{figures[key]:.4g}{spread}", _BETTER[key])
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for name, line in (*facts.items(), *(("warning", line) for line in cautions)):
        console.print(printable(f"{name:<11}{line}"), markup=False)
