"""Samples beside the training images nearest to them: does G draw new images, or those it has seen?"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np

from ..evaluation.nearest import compare
from .pictures import beside
from .study import Study

_SHOWN, _NEIGHBOURS, _TILES, _COLUMNS = 12, 4, 40, 8
_COPY = 0.5  # of the distance between training images, below which samples count as copies


def run(study: Study) -> None:
    """Train a run, draw samples, and search the nearest training images by their pixels."""
    trained = study.train_one("run")
    config = trained.folder.read_config()
    generator, images = study.generator(trained), study.real(trained)
    drawn = study.draw(generator)

    def figures() -> dict[str, Any]:
        found = compare(drawn, images, 1, flip=config.train.flip, seed=study.settings.seed, device=study.device)
        scores = study.score(drawn, trained, min(len(images), len(drawn)))
        return scores | {name: getattr(found, name) for name in ("to_training", "between_training", "measured")}

    results = study.measure("nearest", figures)
    panels = [("samples", drawn[:_TILES]), ("training images", study.some_real(trained, _TILES))]
    study.picture("samples", beside(panels, _COLUMNS), "Samples, not chosen, and some of the training images.")
    shown = compare(drawn[:_SHOWN], images, _NEIGHBOURS, flip=config.train.flip, seed=study.settings.seed)
    halves = [np.stack([tile for row in part for tile in row]) for part in _halves(shown.pictures)]
    title = "sample, and the training images nearest to it"
    study.picture(
        "nearest",
        beside([(title, half) for half in halves], 1 + len(shown.rows[0])),
        "Samples, each beside the training images nearest to it by their pixels, mirrored where that is nearer.",
    )
    to_training, between = results["to_training"], results["between_training"]
    study.table(
        ("", "median distance to the nearest training image, of 255"),
        [
            (f"{len(drawn):,} samples", to_training),
            (f"{results['measured']} training images, to the nearest other one", between or "there is only one"),
        ],
    )
    study.about_scores([results])
    study.say(
        "A distance is the root mean square difference of pixel values. It finds copies of whole images; it does not "
        "find a face that G has learned by heart and draws with other light."
    )
    names = ("frechet_distance", "sharpness", "variety")
    scores = ", ".join(f"{study.names.get(name, name)} {results[name]:.3g}" for name in names)
    study.note(f"{len(images):,} training images; {scores}")
    study.check(
        f"samples are no copies: they lie at least {_COPY:g} times as far from the nearest training image as training "
        "images from each other",
        "one training image" if between is None else f"{to_training:.1f} and {between:.1f}",
        between is not None and to_training >= _COPY * between,
    )
    study.finish(
        "Nearest: new images, or those it has seen?",
        "Not in the paper. A generator that is trained long on few images may draw those. Beside each sample stand the "
        "training images that are nearest to it.",
        {"figures": results, "neighbours": [[dataclasses.asdict(one) for one in row] for row in shown.rows]},
    )


def _halves(rows: list[list[np.ndarray]]) -> list[list[list[np.ndarray]]]:
    middle = (len(rows) + 1) // 2
    return [rows[:middle], rows[middle:]]
