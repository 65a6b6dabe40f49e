"""Gamma against diversity (paper §4.2): a low gamma gives similar images, a high one varied and rougher ones."""

from __future__ import annotations

import numpy as np

from ..figures import new_figure, save_figure
from .convergence import ranks_correlate
from .pictures import beside
from .study import Study
from .training import Trained

GAMMAS = (0.3, 0.5, 0.7)
_TILES, _COLUMNS = 30, 5


def run(study: Study) -> None:
    """Train with each of GAMMAS and several seeds; compare the images' diversity and distance from the data."""
    first = study.settings.seed
    seeds = range(first, first + (study.settings.seeds or 1))
    options = {f"gamma-{gamma}-seed-{seed}": ("--gamma", gamma, "--seed", seed) for seed in seeds for gamma in GAMMAS}
    runs = {trained.name: trained for trained in study.train(options, steps=study.scale.steps_of_many)}

    def figures(trained: Trained) -> dict[str, float]:
        last = trained.last()
        scores = study.score(study.draw(study.generator(trained)), trained)
        return scores | last | {"ratio": last["loss_fake"] / last["loss_real"]}

    results = {name: study.measure(name, lambda t=trained: figures(t)) for name, trained in runs.items()}
    by_gamma = {gamma: [results[f"gamma-{gamma}-seed-{seed}"] for seed in seeds] for gamma in GAMMAS}

    panels = [
        (f"gamma {gamma}", study.draw(study.generator(runs[f"gamma-{gamma}-seed-{first}"]), _TILES)) for gamma in GAMMAS
    ]
    study.say("The same latents drawn by generators that were trained with three diversity ratios:")
    study.picture(
        "samples", beside(panels, _COLUMNS), f"Samples after {study.scale.steps_of_many:,} steps, seed {first}."
    )
    figure, (axes,) = new_figure(width=8, height=3.6)
    axes.axhline(
        results[next(iter(results))]["diversity_against"], color="#999999", linestyle="--", label="training images"
    )
    for index, _ in enumerate(seeds):
        values = [by_gamma[gamma][index]["diversity"] for gamma in GAMMAS]
        label = "generated, a line each seed" if index == 0 else None
        axes.plot(GAMMAS, values, marker="o", color="#1f77b4", alpha=0.8, label=label)
    axes.set_xticks(GAMMAS)
    axes.set_xlabel("gamma")
    axes.set_ylabel("mean L1 between images")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    save_figure(study.folder / "diversity.png", figure)
    study.show("diversity.png", "Mean distance between pairs of images, per value in [-1, 1].")
    columns = ("diversity", "frechet_distance", "precision", "recall", "ratio", "k", "convergence")
    shown = study.names | {"ratio": "L(G(z)) / L(x)", "convergence": "M"}
    study.table(
        ("gamma", "seed", *(shown.get(name, name) for name in columns)),
        [
            (gamma, seed, *(row[name] for name in columns))
            for gamma in GAMMAS
            for seed, row in zip(seeds, by_gamma[gamma], strict=True)
        ],
    )
    study.say("Losses, k and M are means over the last tenth of the rows that were logged.")
    study.about_scores(list(results.values()))
    pairs = [(low["diversity"], high["diversity"]) for low, high in zip(by_gamma[0.3], by_gamma[0.7], strict=True)]
    study.check(
        "gamma 0.3 draws less varied images than gamma 0.7, with every seed",
        ", ".join(f"{low:.3f} and {high:.3f}" for low, high in pairs),
        all(low < high for low, high in pairs),
    )
    means = {str(gamma): float(np.mean([row["diversity"] for row in by_gamma[gamma]])) for gamma in GAMMAS}
    distance = study.names["frechet_distance"]
    near = {gamma: float(np.mean([row["frechet_distance"] for row in by_gamma[gamma]])) for gamma in GAMMAS}
    study.note(
        f"mean {distance} is {', '.join(f'{near[gamma]:.0f} at gamma {gamma}' for gamma in GAMMAS)}: "
        + ("low gamma is closer to the data" if near[0.3] < near[0.7] else "low gamma is no closer to the data here")
    )
    study.note_alike(
        {f"gamma {gamma}, seed {seed}": results[f"gamma-{gamma}-seed-{seed}"] for gamma in GAMMAS for seed in seeds}
    )
    measures = [np.array([row[name] for row in results.values()]) for name in ("convergence", "frechet_distance")]
    study.note(
        f"over all {len(results)} runs M correlates with {distance} by {ranks_correlate(*measures):.2f} (Spearman): "
        "gamma is part of M, which compares runs of one gamma and of the same nets only"
    )
    study.finish(
        "Diversity: what gamma does",
        "The paper's §4.2: gamma is the ratio E[L(G(z))] / E[L(x)] that k keeps up. It finds that a low one gives few "
        "and clean images, and a high one variety, and artefacts. Variety is what is checked here; how clean images "
        "are is left to the pictures.",
        {"diversity": means, "runs": results},
    )
