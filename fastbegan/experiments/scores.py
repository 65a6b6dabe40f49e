"""Standard scores of generated images (paper §4.6)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from .pictures import beside
from .study import Study

_PAPER_SCORE = 5.62  # §4.6: Inception score on CIFAR-10, 32 px, unsupervised
_TILES, _COLUMNS = 40, 8
_SHOWN = ("inception_score", "frechet_distance", "kernel_distance", "precision", "recall", "sharpness", "variety")


def run(study: Study) -> None:
    """Score generated images against training images, beside other training images, one image repeated, and noise."""
    settings = study.settings
    on_cifar = settings.scale == "paper" and (settings.data or "").startswith("cifar10:")
    trained = study.train_one("run", ("--preset", "paper-32") if on_cifar else ())
    count = study.scale.scored
    permuted = np.random.default_rng(study.settings.seed).permutation(study.real(trained).shape[0])
    unscored = np.sort(permuted[count : 2 * count]) if len(permuted) >= 2 * count else None

    def figures() -> dict[str, dict[str, object]]:
        drawn = study.draw(study.generator(trained), count)
        noise = np.random.default_rng(study.settings.seed).integers(0, 256, drawn.shape, np.uint8)
        sets = {"generated": drawn, "collapsed": np.repeat(drawn[:1], count, 0), "noise": noise}
        sets |= {} if unscored is None else {"others": study.real(trained)[unscored]}
        return {name: study.score(images, trained, count) for name, images in sets.items()}

    results = study.measure("scores", figures)
    panels = [
        ("generated", study.draw(study.generator(trained), _TILES)),
        ("training images", study.some_real(trained, _TILES)),
    ]
    study.picture("samples", beside(panels, _COLUMNS), "Some of the scored images, and some of the training images.")
    titles = {
        "others": "other training images",
        "generated": "generated",
        "collapsed": "one generated image, repeated",
        "noise": "noise",
    }
    study.table(
        ("", *(study.names.get(name, name) for name in _SHOWN)),
        [
            (titles[name], _with_spread(results[name]), *(results[name][column] for column in _SHOWN[1:]))
            for name in titles
            if name in results
        ],
    )
    config = trained.folder.read_config()
    study.about_scores([results["generated"]])
    study.say(
        "Inception scores are means over ten parts of the images"
        + (
            ": here of so few each that they compare with nothing else."
            if results["generated"]["count"] < 50_000
            else "."
        )
    )
    if study.settings.extractor == "inception" and config.train.data.startswith("cifar10:"):
        study.say(f"The paper reports an Inception score of {_PAPER_SCORE} on CIFAR-10 (§4.6).")
    elif study.settings.extractor != "inception":
        study.say(
            "These are no Inception scores and no FID: for those give `--extractor inception --inception FILE`, and "
            f"for the paper's figure ({_PAPER_SCORE} on CIFAR-10) `--data cifar10:ROOT --scale paper` too."
        )
    generated, collapsed = results["generated"], results["collapsed"]
    name = study.names["frechet_distance"]
    if real := results.get("others"):
        study.note(
            f"how far there is to go: {name} is {generated['frechet_distance']:.0f} for generated images and "
            f"{real['frechet_distance']:.0f} for other training images; precision {generated['precision']:.3g} "
            f"and {real['precision']:.3g}, recall {generated['recall']:.3g} and {real['recall']:.3g}"
        )
    study.check(
        f"generated images have a lower {name} than one of them repeated",
        f"{generated['frechet_distance']:.0f} and {collapsed['frechet_distance']:.0f}",
        generated["frechet_distance"] < collapsed["frechet_distance"],
    )
    study.finish(
        "Scores",
        "The paper's §4.6 reports an Inception score on CIFAR-10. A score says something beside others of the same "
        "table only: same extractor, same number of images, same resizing.",
        results,
    )


def _with_spread(figures: Mapping[str, Any]) -> str:
    return f"{figures['inception_score']:.3g} ± {figures['inception_score_std']:.2g}"
