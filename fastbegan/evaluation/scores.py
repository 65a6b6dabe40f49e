"""`fastbegan evaluate`: how far a generator's images, or any images, are from a data set (paper §4.6 has the score).

torch-fidelity computes the figures. They go by the name of the net whose features were compared: only Inception's are
called FID and KID.
"""

from __future__ import annotations

from dataclasses import dataclass
from json import dumps
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from .. import counter
from ..config import require_seed
from ..data.prepare import Progress, load_images
from ..data.scale import scale
from ..device import pick_device
from ..display import Display
from ..errors import UserError
from ..runs import sheets as samples
from ..runs.folder import RunConfig, RunFolder
from .extractors import DISPLAY, Extractor, open_extractor

LEAST = 10
"""Images of a side: the inception score is a mean over ten parts."""
ENOUGH = 10_000
"""Images of a side below which figures are said to be biased."""
_SCATTERED = 512  # images of a side whose distances are its diversity
_SEED, _NEIGHBOURS = 2020, 3  # torch-fidelity's defaults, said here so that figures stay comparable
_SUBSET, _SUBSETS = 1000, 100  # of the kernel distance
_BATCH = {"cpu": 8, "cuda": 64}  # small enough for a core's cache
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


def names(extractor: str) -> dict[str, str]:
    """What the figures of `score` are to be called, by their keys. Raises UserError for an unknown extractor."""
    if extractor not in DISPLAY:
        raise UserError(f"extractor is {extractor!r}; accepted: {', '.join(DISPLAY)}")
    usual, net = extractor == "inception", DISPLAY[extractor]
    return {
        "frechet_distance": "FID" if usual else f"FD ({net})",
        "kernel_distance": "KID" if usual else f"KD ({net})",
        "inception_score": "IS" if usual else f"IS ({net})",
        "precision": f"precision ({net})",  # in the literature it is VGG16's
        "recall": f"recall ({net})",
        "diversity": "diversity of the images",
        "diversity_against": "diversity of the data set",
    }


class Yardstick:
    """A data set whose features are kept, to score many sets of images against it."""

    def __init__(
        self,
        against: np.ndarray,
        *,
        extractor: str | Extractor = "efficientnet-lite0",
        inception: Path | None = None,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """`against` is uint8 [N, H, W, 3], N from 10; `progress` hears how many features are there.

        Raises UserError for other arrays, and as `extractors.open_extractor`.
        """
        _check("against", against)
        self._net = open_extractor(extractor, inception, device) if isinstance(extractor, str) else extractor
        from torch_fidelity.metric_fid import fid_features_to_statistics  # it is there, for an extractor is

        self._device = next(self._net.parameters()).device
        self._progress = progress
        self._shape, self._count = against.shape[1:], len(against)
        self._features, _ = self._extract(against, "looking at the data set")
        self._statistics = fid_features_to_statistics(self._features)
        self._diversity = _diversity(against)

    def score(self, images: np.ndarray) -> dict[str, Any]:
        """Figures of `images`, uint8 [N, H, W, 3] of the data set's height and width, N from 10; see `score`."""
        _check("images", images)
        if images.shape[1:] != self._shape:
            raise UserError(f"images are {images.shape[1:]}; accepted: as the data set, {self._shape}")
        from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
        from torch_fidelity.metric_isc import isc_features_to_metric
        from torch_fidelity.metric_kid import kid_features_to_metric
        from torch_fidelity.metric_prc import prc_features_to_metric

        features, logits = self._extract(images, "looking at the images")
        fewer, more = sorted((len(images), self._count))
        subset = min(_SUBSET, fewer)
        frechet = fid_statistics_to_metric(fid_features_to_statistics(features), self._statistics, verbose=False)
        kernel = kid_features_to_metric(
            features, self._features, kid_subset_size=subset, kid_subsets=_SUBSETS if more > subset else 1,
            rng_seed=_SEED, verbose=False,
        )  # fmt: skip
        shapes = prc_features_to_metric(
            features, self._features, prc_neighborhood=_NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
        scores = isc_features_to_metric(logits, rng_seed=_SEED)
        return {
            "inception_score": scores["inception_score_mean"],
            "frechet_distance": frechet["frechet_inception_distance"],
            "kernel_distance": kernel["kernel_inception_distance_mean"],
            "precision": shapes["precision"],
            "recall": shapes["recall"],
            "diversity": _diversity(images),
            "diversity_against": self._diversity,
            "inception_score_std": scores["inception_score_std"],
            "count": len(images),
            "count_against": self._count,
            "extractor": self._net.name,
            "resize": self._net.resize,
        }

    @torch.no_grad()
    def _extract(self, images: np.ndarray, doing: str) -> tuple[Tensor, Tensor]:
        batch, features, logits = _BATCH.get(self._device.type, 64), [], []
        # a GPU's TF32 would give other features than a CPU
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for start in range(0, len(images), batch):
                some = torch.from_numpy(np.array(images[start : start + batch])).to(self._device)
                of_these = self._net(some.permute(0, 3, 1, 2))
                features.append(of_these[0].cpu())
                logits.append(of_these[1].cpu())
                if self._progress is not None:
                    self._progress(doing, min(start + batch, len(images)), len(images))
        return torch.cat(features), torch.cat(logits)


def score(
    images: np.ndarray,
    against: np.ndarray,
    *,
    extractor: str = "efficientnet-lite0",
    inception: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Compare `images`, uint8 [N, H, W, 3], with `against`, uint8 [M, H, W, 3]; N and M from 10.

    Returns plain numbers, the same for the same input: `inception_score` (Salimans et al. 2016), the mean over ten
    parts, and `inception_score_std` over them;
    `frechet_distance` (Heusel et al. 2017); `kernel_distance` (Binkowski et al. 2018), the mean over 100 subsets of
    1000 images or, of smaller sets, as many as the smaller one has, where one subset is enough if that is all of both;
    `precision` and `recall` (Kynkaanniemi et al. 2019) with 3 neighbours; `diversity` and `diversity_against`, the mean
    L1 distance between 512 images of a side, or all if they are fewer, in [-1, 1]. And `count`, `count_against`,
    `extractor`, and `resize`, how the extractor scales images. `names` has what the figures are called.

    Raises UserError for other arrays, and as `extractors.open_extractor`. For many sets of images, keep a `Yardstick`.
    """
    return Yardstick(against, extractor=extractor, inception=inception, device=device).score(images)


def _check(name: str, images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise UserError(f"{name} is {images.dtype} {list(images.shape)}; accepted: uint8 [N, H, W, 3]")
    if len(images) < LEAST:
        raise UserError(f"{name} has {len(images)} images; accepted: from {LEAST}")


def _diversity(images: np.ndarray) -> float:
    some = torch.from_numpy(images[_chosen(len(images), _SCATTERED, 0)])
    return samples.diversity(some.permute(0, 3, 1, 2).float() / 127.5 - 1)


def _chosen(total: int, count: int, seed: int, *, from_end: bool = False) -> np.ndarray:
    """`count` of `total` places, in rising order: the first of a random order, or its last."""
    order = counter.permutation(seed, counter.SHEET, 0, total)
    return (order[max(0, total - count) :] if from_end else order[:count]).sort().values.numpy()


@dataclass(frozen=True)
class _Side:
    """Images of one side, uint8 [N, size, size, 3], and a few words on what they are and how they came to this size."""

    pixels: np.ndarray
    source: str
    scaled: str
    crc32: int | None = None
    total: int = 0


def evaluate_command(
    images: str,
    against: str | None = None,
    *,
    count: int = 5000,
    size: int | None = None,
    crop: str | None = None,
    extractor: str = "efficientnet-lite0",
    inception: Path | None = None,
    seed: int = 0,
    device: str = "auto",
    json: bool = False,
) -> int:
    """Score `images` against a data set and print the figures; see `commands.Evaluate`. Raises UserError."""
    require_seed(seed)
    for name, value, least in (("count", count, LEAST), ("size", 1 if size is None else size, 1)):
        if value < least:
            raise UserError(f"{name} is {value}; accepted: whole numbers from {least}")
    run = RunFolder(Path(images))
    config = run.read_config() if run.exists() else None
    if config is None and against is None:
        raise UserError(f"against is missing, and {images!r} is no run folder that would say it; give --against DATA")
    place = pick_device(device)[0]
    net = open_extractor(extractor, inception, place)
    if config is not None:
        against, crop = against or config.train.data, crop or config.train.crop
    assert against is not None
    crop, jitter = crop or "center", 0
    if size is None:
        size = config.model.size if config else 64
    if config is not None and size == config.model.size:
        jitter = config.train.jitter
    with Display(quiet=json) as display:
        show, max_bad = display.preparing, config.train.max_bad if config else 1.0
        other = _load(against, size, crop, jitter, count, seed, max_bad, show)
        if config is None:
            side = _load(images, size, crop, 0, count, seed, 1.0, show, from_end=True)
        else:
            side = _draw(run, config, size, count, seed, place, show)
        yardstick = Yardstick(other.pixels, extractor=net, progress=show)
        figures = yardstick.score(side.pixels)
    facts = {
        "images": side.source,
        "against": other.source,
        "size": f"{size} px; images: {side.scaled}; data set: {other.scaled}",
        "extractor": f"{net.weights}; it scales what it sees itself: {net.resize}",
        "diversity": f"mean L1 distance between images in [-1, 1], {_SCATTERED} of a side at most",
    }
    warned = _warnings(side, other)
    if json:
        print(dumps({**figures, "names": names(extractor), "about": facts, "warnings": warned}, indent=2))
    else:
        _show(figures, facts, warned)
    return 0


def _draw(
    run: RunFolder, config: RunConfig, size: int, count: int, seed: int, device: torch.device, progress: Progress
) -> _Side:
    """What the averaged generator makes of `fastbegan sample`'s latents."""
    generator = run.load_generator(device)
    z = samples.sheet_latents(config.model.latent, seed, count, device)
    drawn: list[np.ndarray] = []
    for part in z.split(64):
        drawn.append(samples.generate(generator, part))
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
    pixels = found.images[_chosen(total, count, seed, from_end=from_end)]
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
