"""Gamma against variety and quality (paper §4.2)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ..data.styles import style_of
from ..figures import new_figure, save_figure
from .convergence import ranks_correlate
from .pictures import beside
from .study import Study
from .training import Trained

GAMMAS = (0.3, 0.5, 0.7)
GAMMAS_DRAWN = (0.8, 0.9, 1.0)  # below, images of drawn faces are all alike
_TILES, _COLUMNS = 30, 5


def run(study: Study) -> None:
    """Train with three gammas and several seeds; compare variety, sharpness and distance from the data."""
    drawn, first = style_of(study.settings.data or "") is not None, study.settings.seed
    gammas = GAMMAS_DRAWN if drawn else GAMMAS
    seeds = range(first, first + (study.settings.seeds or 1))
    options = {_name(gamma, seed): ("--gamma", gamma, "--seed", seed) for seed in seeds for gamma in gammas}
    runs = {trained.name: trained for trained in study.train(options, steps=study.scale.steps_of_many)}

    def figures(trained: Trained) -> dict[str, float]:
        return study.score(study.draw(study.generator(trained)), trained) | trained.last()

    results = {name: study.measure(name, lambda t=trained: figures(t)) for name, trained in runs.items()}
    panels = [(f"gamma {gamma}", study.draw(study.generator(runs[_name(gamma, first)]), _TILES)) for gamma in gammas]
    study.say("The same latents drawn by generators that were trained with three diversity ratios:")
    study.picture(
        "samples", beside(panels, _COLUMNS), f"Samples after {study.scale.steps_of_many:,} steps, seed {first}."
    )
    distance = study.names["frechet_distance"]
    by_seed = {seed: [results[_name(gamma, seed)] for gamma in gammas] for seed in seeds}
    _draw(study, gammas, by_seed, {"variety": "variety", "sharpness": "sharpness", "frechet_distance": distance})
    study.show("gamma.png", "Three figures against gamma, a line each seed. Variety and sharpness of the data are 1.")
    columns = ("variety", "sharpness", "frechet_distance", "precision", "recall", "ratio", "k", "convergence")
    shown = study.names | {"ratio": "L(G(z)) / L(x)", "convergence": "M"}
    study.table(
        ("gamma", "seed", *(shown.get(name, name) for name in columns)),
        [
            (gamma, seed, *(row[name] for name in columns))
            for place, gamma in enumerate(gammas)
            for seed, row in ((seed, rows[place]) for seed, rows in by_seed.items())
        ],
    )
    study.say("Losses, k and M are means over the last tenth of the rows that were logged.")
    study.about_scores(list(results.values()))
    for name in ("variety", "sharpness"):
        _check_order(study, name, gammas, by_seed)
    if drawn:
        study.say(
            "A gamma below 1 asks for samples that D reconstructs better than the data. Photographs have texture that "
            "D leaves out, so samples without it meet a gamma of 0.5. Drawn faces have none: below 1 their samples can "
            "only be softer, or of fewer kinds."
        )
    study.note_alike({f"gamma {gamma}, seed {seed}": results[_name(gamma, seed)] for gamma in gammas for seed in seeds})
    measures = [np.array([row[name] for row in results.values()]) for name in ("convergence", "frechet_distance")]
    study.note(
        f"over all {len(results)} runs M correlates with {distance} by {ranks_correlate(*measures):.2f} (Spearman): "
        "gamma is part of M, which compares runs of one gamma and of the same nets only"
    )
    study.finish(
        "Diversity: what gamma does",
        "The paper's §4.2: gamma is the ratio E[L(G(z))] / E[L(x)] that k keeps up. It finds that a low one gives few "
        "and clean images, and a high one variety, and artefacts. Here variety is the distance between samples, and "
        "sharpness the difference of neighbouring pixels, each over that of the data.",
        {"gammas": gammas, "runs": results},
    )


def _name(gamma: float, seed: int) -> str:
    return f"gamma-{gamma}-seed-{seed}"


def _check_order(
    study: Study, name: str, gammas: Sequence[float], by_seed: Mapping[int, Sequence[Mapping[str, Any]]]
) -> None:
    values = [[row[name] for row in rows] for rows in by_seed.values()]
    study.check(
        f"{name} grows with gamma, {', '.join(map(str, gammas))}, with every seed",
        "; ".join(", ".join(f"{value:.2f}" for value in row) for row in values),
        all(row == sorted(set(row)) for row in values),
    )


def _draw(
    study: Study,
    gammas: Sequence[float],
    by_seed: Mapping[int, Sequence[Mapping[str, Any]]],
    titles: Mapping[str, str],
) -> None:
    figure, axes = new_figure(rows=len(titles), width=7, height=7.5, share_x=True)
    for ax, (name, title) in zip(axes, titles.items(), strict=True):
        for rows in by_seed.values():
            ax.plot(gammas, [row[name] for row in rows], marker="o", color="#1f77b4", alpha=0.8)
        ax.set_ylabel(title)
        ax.set_ylim(bottom=0)
    axes[-1].set_xticks(gammas)
    axes[-1].set_xlabel("gamma")
    save_figure(study.folder / "gamma.png", figure)
