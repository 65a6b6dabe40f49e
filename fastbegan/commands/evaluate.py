"""`fastbegan evaluate`: how far a generator's images, or any images, are from a data set."""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from tyro.conf import Positional

from ..counter import chosen
from ..data.prepare import Progress, load_images
from ..data.scale import scale
from ..device import pick_device
from ..display import Display
from ..errors import UserError
from ..evaluation.extractors import open_extractor
from ..evaluation.scores import LEAST, SCATTERED, Yardstick, names
from ..fields import require_seed
from ..runs import sheets
from ..runs.folder import RunConfig, RunFolder

ENOUGH = 10_000
"""Images of a side below which figures are said to be biased."""
_FILTER = "bilinear, antialiased"  # of data.scale, which makes packs too
_BETTER = {
    "frechet_distance": "lower",
    "kernel_distance": "lower",
    "inception_score": "higher",
    "precision": "higher",
    "recall": "higher",
    "diversity": "near the data set's",
    "diversity_against": "",
}


@dataclass(frozen=True)
class Evaluate:
    """Compare images, a generator's or files, with a data set: Frechet and kernel distance, inception score, precision,
    recall, diversity."""

    images: Positional[str]
    """A run folder, whose averaged generator draws them, or images as train takes them for data."""
    against: str | None = None
    """The data set, as train takes it. Default: what the run was trained on."""
    count: int = 5000
    """How many images of each side, or all there are. Below 10,000 the Frechet distance comes out clearly too high."""
    size: int | None = None
    """Height and width to which both sides are scaled. Default: the run's, else 64."""
    crop: str | None = None
    """As for train. Default: the run's, else center."""
    extractor: Literal["efficientnet-lite0", "inception"] = "efficientnet-lite0"
    """Whose features are compared. inception needs its weights, by --inception, and gives the usual FID."""
    inception: Path | None = None
    """File of torch-fidelity's weights of Inception, weights-inception-2015-12-05-6726825d.pth; its hash is checked."""
    seed: int = 0
    """Which latents, and which images of a set that has more than --count."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print only JSON."""

    def run(self) -> int:
        return evaluate(self)


@dataclass(frozen=True)
class _Side:
    """Images of one side, uint8 [N, size, size, 3], and a few words on what they are and how they came to this size."""

    pixels: np.ndarray
    source: str
    scaled: str
    crc32: int | None = None
    total: int = 0


def evaluate(options: Evaluate) -> int:
    """Score `images` against a data set and print the figures; Raises UserError."""
    require_seed(options.seed)
    count, seed, against, crop, size = options.count, options.seed, options.against, options.crop, options.size
    for name, value, least in (("count", count, LEAST), ("size", 1 if size is None else size, 1)):
        if value < least:
            raise UserError(f"{name} is {value}; accepted: whole numbers from {least}")
    run = RunFolder(Path(options.images))
    config = run.read_config() if run.exists() else None
    if config is None and against is None:
        raise UserError(
            f"against is missing, and {options.images!r} is no run folder that would say it; give --against DATA"
        )
    place = pick_device(options.device)[0]
    net = open_extractor(options.extractor, options.inception, place)
    if config is not None:
        against, crop = against or config.train.data, crop or config.train.crop
    assert against is not None
    crop, jitter = crop or "center", 0
    if size is None:
        size = config.model.size if config else 64
    if config is not None and size == config.model.size:
        jitter = config.train.jitter
    with Display(quiet=options.json) as display:
        show, max_bad = display.preparing, config.train.max_bad if config else 1.0
        other = _load(against, size, crop, jitter, count, seed, max_bad, show)
        if config is None:
            side = _load(options.images, size, crop, 0, count, seed, 1.0, show, from_end=True)
        else:
            side = _draw(run, config, size, count, seed, place, show)
        yardstick = Yardstick(other.pixels, extractor=net, progress=show)
        figures = yardstick.score(side.pixels)
    facts = {
        "images": side.source,
        "against": other.source,
        "size": f"{size} px; images: {side.scaled}; data set: {other.scaled}",
        "extractor": f"{net.weights}; it scales what it sees itself: {net.resize}",
        "diversity": f"mean L1 distance between images in [-1, 1], {SCATTERED} of a side at most",
    }
    warned = _warnings(side, other)
    if options.json:
        print(dumps({**figures, "names": names(options.extractor), "about": facts, "warnings": warned}, indent=2))
    else:
        _show(figures, facts, warned)
    return 0


def _draw(
    run: RunFolder, config: RunConfig, size: int, count: int, seed: int, device: torch.device, progress: Progress
) -> _Side:
    """What the averaged generator makes of `fastbegan sample`'s latents."""
    generator = run.load_generator(device)
    z = sheets.sheet_latents(config.model.latent, seed, count, device)
    drawn: list[np.ndarray] = []
    for part in z.split(64):
        drawn.append(sheets.generate(generator, part))
        progress("drawing images", sum(map(len, drawn)), count)
    pixels, own = np.concatenate(drawn), config.model.size
    scaled = f"drawn at {own} px"
    if own != size:
        pixels, scaled = scale(list(pixels), size), f"drawn at {own} px, then {_FILTER}"
    return _Side(pixels, f"{count:,} drawn by {run.path} (averaged generator, seed {seed})", scaled)


def _load(
    data: str, size: int, crop: str, jitter: int, count: int, seed: int, max_bad: float, progress: Progress,
    *, from_end: bool = False,
) -> _Side:  # fmt: skip
    """`count` images of `data`, or all there are. With `jitter`, the middle of what training shifts."""
    found = load_images(data, stored := size + 2 * jitter, crop, progress, max_bad=max_bad)
    if (total := len(found.images)) < LEAST:
        raise UserError(f"data {data!r} has only {total} images; accepted here: from {LEAST}")
    pixels = found.images[chosen(total, count, seed, from_end=from_end)]
    pixels = pixels[:, jitter : jitter + size, jitter : jitter + size]
    all_of = f"all {total:,} there are ({count:,} were asked for)" if total < count else f"{len(pixels):,}"
    if data.partition(":")[0] == "faces":
        scaled = f"drawn at {stored} px"
    elif Path(data).suffix == ".pack":
        scaled = f"as packed, at {stored} px ({_FILTER})"
    else:
        scaled = f"{_FILTER}, crop {crop}, as for packs" + (f", at {stored} px" if jitter else "")
    scaled += ", the middle of it" if jitter else ""
    return _Side(pixels, f"{all_of} of: {found.description}", scaled, found.crc32, total)


def _warnings(side: _Side, other: _Side) -> list[str]:
    """In what the figures could mislead."""
    found, counts = [], (len(side.pixels), len(other.pixels))
    if min(counts) < ENOUGH:
        found.append(
            f"fewer than {ENOUGH:,} images on a side: the Frechet distance comes out too high, the inception score too "
            "low; compare only with figures of as many images"
        )
    if counts[0] != counts[1]:
        found.append(
            f"the sides have different counts, {counts[0]:,} and {counts[1]:,}; compare only with such figures"
        )
    if side.crc32 is not None and (side.crc32, side.total) == (other.crc32, other.total):
        shared = max(0, sum(counts) - side.total)
        found.append(f"both sides are the same set and share {shared:,} images")
    return found


def _show(figures: dict[str, Any], facts: dict[str, str], warned: list[str]) -> None:
    counts = f"{figures['count']:,} images against {figures['count_against']:,}"
    table = Table("figure", "value", "better is", title=counts)
    table.columns[1].justify = "right"
    for key, name in names(figures["extractor"]).items():
        spread = f" ± {figures['inception_score_std']:.2g}" if key == "inception_score" else ""
        table.add_row(name, f"{figures[key]:.4g}{spread}", _BETTER[key])
    console = Console(highlight=False, soft_wrap=True)
    console.print(table)
    for name, line in (*facts.items(), *(("warning", line) for line in warned)):
        console.print(f"{name:<11}{line}".encode("utf-8", "replace").decode(), markup=False)
