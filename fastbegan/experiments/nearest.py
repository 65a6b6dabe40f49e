"""Samples beside the training images nearest to them: does G draw new images, or those it has seen?"""

from __future__ import annotations

import numpy as np

from ..evaluation.nearest import compare
from .pictures import beside
from .study import Study

_SHOWN, _NEIGHBOURS, _TILES, _COLUMNS = 12, 4, 40, 8
_COPY = 0.5  # of the distance between training images, below which samples count as copies


def run(study: Study) -> None:
    """Train a run, draw samples, and search the nearest training images by their pixels."""
    trained = study.train_one("run")
    flip = trained.folder.read_config().train.flip
    generator, images = study.generator(trained), study.real(trained)
    drawn = study.draw(generator)
    scores = study.measure("scores", lambda: study.score(drawn, trained, min(len(images), len(drawn))))
    found = compare(drawn, images, _NEIGHBOURS, flip=flip, seed=study.settings.seed, device=study.device)
    panels = [("samples", drawn[:_TILES]), ("training images", study.some_real(trained, _TILES))]
    study.picture("samples", beside(panels, _COLUMNS), "Samples, not chosen, and some of the training images.")
    middle = _SHOWN // 2
    halves = [
        np.stack([tile for row in part for tile in row])
        for part in (found.pictures[:middle], found.pictures[middle:_SHOWN])
    ]
    title = "sample, and the training images nearest to it"
    study.picture(
        "nearest",
        beside([(title, half) for half in halves], 1 + len(found.rows[0])),
        "Samples, each beside the training images nearest to it by their pixels, mirrored where that is nearer.",
    )
    to_training, between = found.to_training or 0.0, found.between_training
    study.table(
        ("", "median distance to the nearest training image, of 255"),
        [
            (f"{len(drawn):,} samples", to_training),
            (f"{found.measured} training images", "there is only one" if between is None else between),
        ],
    )
    study.about_scores([scores])
    study.say(
        "A distance is the root mean square difference of pixel values. It finds copies of whole images; it does not "
        "find a face that G has learned by heart and draws with other light."
    )
    named = ((study.names[name], scores[name]) for name in ("frechet_distance", "sharpness", "variety"))
    study.note(f"{len(images):,} training images; {', '.join(f'{name} {value:.3g}' for name, value in named)}")
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
        scores | {"to_training": to_training, "between_training": between},
    )
