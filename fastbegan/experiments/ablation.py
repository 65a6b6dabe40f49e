"""Effect of single choices: skips, vanishing residuals (paper §3.5.1), order of updates, draws of z."""

from __future__ import annotations

from .comparison import check_finite, compare
from .study import Study


def run(study: Study) -> None:
    """Train the usual BEGAN and five variants, and compare their figures."""
    steps = study.scale.steps_of_many
    # two convolutions per level: with one, hardly any layer keeps its width, as a residual needs
    fade = min(16_000, steps // 2)
    vanishing = ("--vanishing", "--carry-steps", fade)
    changes = {
        "usual": (),
        "no-skips": ("--no-skips",),
        "vanishing": vanishing,
        "vanishing-no-skips": ("--no-skips", *vanishing),
        "alternating": ("--updates", "alternating"),
        "independent": ("--latents", "independent"),
    }
    titles = {
        "usual": "usual: skips, simultaneous, shared z",
        "no-skips": "no skips",
        "vanishing": "skips and vanishing residuals",
        "vanishing-no-skips": "vanishing residuals, no skips",
        "alternating": "alternating updates",
        "independent": "independent z",
    }
    figures = compare(study, {name: ("--repeats", 2, *options) for name, options in changes.items()}, titles)
    for name, row in figures.items():
        check_finite(study, titles[name], row)
    study.say(
        f"Vanishing residuals: the carry fell from 1 to 0 over the first {fade:,} of {steps:,} steps. All nets here "
        "have two convolutions a level (`--repeats 2`), so figures of experiments with other nets do not compare."
    )
    study.finish(
        "Ablation: what each choice brings",
        "Skips and vanishing residuals are options in the paper (§3.5.1). It updates both players from the same "
        "parameters and can be read as drawing z once (§3.4); alternating updates and independent draws are usual too.",
        figures,
    )
