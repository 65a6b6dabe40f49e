"""Scores of images against a data set, computed by torch-fidelity (the paper's §4.6 reports an inception score).

A figure carries the name of the net whose features it compares; only Inception's are called FID and KID.
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
from ..runs.appearance import compare, diversity
from .extractors import DISPLAY, Extractor, open_extractor

LEAST = 10
"""Images per side, at least: the inception score is a mean over ten parts."""
SCATTERED = 512
"""Images per side, at most, whose distances give its diversity."""
_SEED, _NEIGHBOURS = 2020, 3  # torch-fidelity's defaults, fixed here so that figures stay comparable
_SUBSET, _SUBSETS = 1000, 100  # of the kernel distance: images of a subset, number of subsets
_BATCH = {"cpu": 8, "cuda": 64}  # on a CPU small enough for a core's cache


def names(extractor: str) -> dict[str, str]:
    """Names of the figures of `score`, by their keys. Raises UserError for an unknown extractor."""
    if extractor not in DISPLAY:
        raise UserError(f"extractor is {extractor!r}; accepted: {', '.join(DISPLAY)}")
    usual, net = extractor == "inception", DISPLAY[extractor]
    return {
        "frechet_distance": "FID" if usual else f"FD ({net})",
        "kernel_distance": "KID" if usual else f"KD ({net})",
        "inception_score": "IS" if usual else f"IS ({net})",
        "precision": f"precision ({net})",  # the literature takes VGG16
        "recall": f"recall ({net})",
        "sharpness": "sharpness",
        "variety": "variety",
        "diversity": "diversity of the images",
        "diversity_against": "diversity of the data set",
    }


class Yardstick:
    """A data set with its features, to score many sets of images against it."""

    def __init__(
        self,
        against: np.ndarray,
        *,
        extractor: str | Extractor = "efficientnet-lite0",
        inception: Path | None = None,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
    ) -> None:
        """Compute the features of the data set.

        Args:
            against: The data set: uint8 [N, H, W, 3], N from 10.
            extractor: The net, or its name.
            inception: The file of Inception's weights, where the name asks for it.
            device: Where a net that is named here runs.
            progress: Called after each batch of images.

        Raises:
            UserError: `against` is another array, or `extractors.open_extractor` fails.
        """
        _check("against", against)
        self._net = open_extractor(extractor, inception, device) if isinstance(extractor, str) else extractor
        from torch_fidelity.metric_fid import fid_features_to_statistics  # every extractor needs the package

        self._device = next(self._net.parameters()).device
        self._progress = progress
        self._shape, self._count = against.shape[1:], len(against)
        self._features, _ = self._extract(against, "looking at the data set")
        self._statistics = fid_features_to_statistics(self._features)
        self._sample = _sample(against)
        self._diversity = diversity(self._sample)

    def score(self, images: np.ndarray) -> dict[str, Any]:
        """Score `images`, uint8 [N, H, W, 3] with the data set's H and W, N from 10; returns figures as `score`."""
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
        subsets = _SUBSETS if more > subset else 1  # one subset holds all images of both sides
        frechet = fid_statistics_to_metric(fid_features_to_statistics(features), self._statistics, verbose=False)
        kernel = kid_features_to_metric(
            features, self._features, kid_subset_size=subset, kid_subsets=subsets, rng_seed=_SEED, verbose=False
        )
        shapes = prc_features_to_metric(
            features, self._features, prc_neighborhood=_NEIGHBOURS, save_cpu_ram=True, verbose=False
        )
        scores = isc_features_to_metric(logits, rng_seed=_SEED)
        looks = compare(_sample(images), self._sample)
        return {
            "inception_score": scores["inception_score_mean"],
            "frechet_distance": frechet["frechet_inception_distance"],
            "kernel_distance": kernel["kernel_inception_distance_mean"],
            "precision": shapes["precision"],
            "recall": shapes["recall"],
            "sharpness": looks.sharpness,
            "variety": looks.variety,
            "diversity": looks.diversity,
            "diversity_against": self._diversity,
            "inception_score_std": scores["inception_score_std"],
            "count": len(images),
            "count_against": self._count,
            "extractor": self._net.name,
            "resize": self._net.resize,
        }

    @torch.no_grad()
    def _extract(self, images: np.ndarray, work: str) -> tuple[Tensor, Tensor]:
        """Features and logits of all images, on the CPU."""
        batch, features, logits = _BATCH.get(self._device.type, 64), [], []
        # with TF32 a GPU would give other features than a CPU
        with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
            for start in range(0, len(images), batch):
                part = torch.from_numpy(np.array(images[start : start + batch])).to(self._device)
                part_features, part_logits = self._net(part.permute(0, 3, 1, 2))
                features.append(part_features.cpu())
                logits.append(part_logits.cpu())
                if self._progress is not None:
                    self._progress(work, min(start + batch, len(images)), len(images))
        return torch.cat(features), torch.cat(logits)


def score(
    images: np.ndarray,
    against: np.ndarray,
    *,
    extractor: str = "efficientnet-lite0",
    inception: Path | None = None,
    device: torch.device | str = "cpu",
) -> dict[str, Any]:
    """Compare two sets of images; the same input gives the same numbers. For many sets, use a `Yardstick`.

    Args:
        images: uint8 [N, H, W, 3], N from 10.
        against: The data set: uint8 [M, H, W, 3], M from 10.
        extractor: The net whose features are compared: efficientnet-lite0 or inception.
        inception: The file of Inception's weights.
        device: Where the net runs.

    Returns:
        Plain numbers and words (`names` has the titles of the figures):
        - `inception_score` (Salimans et al. 2016): the mean over ten parts; `inception_score_std`: over the same.
        - `frechet_distance` (Heusel et al. 2017).
        - `kernel_distance` (Binkowski et al. 2018): the mean over 100 subsets of 1000 images. Smaller sets have
          subsets of min(N, M) images, and a single one where that is all of both.
        - `precision` and `recall` (Kynkaanniemi et al. 2019), with 3 neighbours.
        - `sharpness` and `variety`: of at most 512 images per set, as `runs.appearance` defines them.
        - `diversity` and `diversity_against`: the mean L1 distance between images in [-1, 1], of at most 512 per set.
        - `count` and `count_against`; `extractor`; `resize`, how the extractor scales images.

    Raises:
        UserError: An array has another dtype or shape, or `extractors.open_extractor` fails.
    """
    return Yardstick(against, extractor=extractor, inception=inception, device=device).score(images)


def _check(name: str, images: np.ndarray) -> None:
    if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
        raise UserError(f"{name} is {images.dtype} {list(images.shape)}; accepted: uint8 [N, H, W, 3]")
    if len(images) < LEAST:
        raise UserError(f"{name} has {len(images)} images; accepted: from {LEAST}")


def _sample(images: np.ndarray) -> Tensor:
    """Some images, float32 [N, 3, H, W] in [-1, 1]."""
    part = torch.from_numpy(images[chosen(len(images), SCATTERED, 0)])
    return part.permute(0, 3, 1, 2).float() / 127.5 - 1
