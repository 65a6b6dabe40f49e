"""`fastbegan evaluate`: how far a generator's images, or any images, are from a data set (paper §4.6 has the score).

torch-fidelity computes the figures. They go by the name of the net whose features were compared: only Inception's are
called FID and KID.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..counter import chosen
from ..data.prepare import Progress
from ..errors import UserError
from ..runs.sheets import diversity
from .extractors import DISPLAY, Extractor, open_extractor

LEAST = 10
"""Images of a side: the inception score is a mean over ten parts."""
SCATTERED = 512
"""Images of a side whose distances are its diversity."""
_SEED, _NEIGHBOURS = 2020, 3  # torch-fidelity's defaults, said here so that figures stay comparable
_SUBSET, _SUBSETS = 1000, 100  # of the kernel distance
_BATCH = {"cpu": 8, "cuda": 64}  # small enough for a core's cache


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
    some = torch.from_numpy(images[chosen(len(images), SCATTERED, 0)])
    return diversity(some.permute(0, 3, 1, 2).float() / 127.5 - 1)
