"""Runs that differ in one setting each: trained, scored, and shown side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .pictures import beside
from .study import Study
from .training import Trained

_TILES, _COLUMNS, _PANELS = 20, 4, 4
_SHOWN = (
    "frechet_distance",
    "kernel_distance",
    "sharpness",
    "variety",
    "precision",
    "recall",
    "ratio",
    "convergence",
    "k",
)


def compare(study: Study, options: Mapping[str, Sequence[object]], titles: Mapping[str, str]) -> dict[str, Any]:
    """Train a run per name, and add samples and a table to the report.

    Args:
        study: The experiment.
        options: Options of `fastbegan train`, by the run's name.
        titles: Titles in the report, by the run's name.

    Returns:
        The figures of each run, by its name. A run that a number which was not finite has ended has only `finite`,
        False.
    """
    runs = study.train(options, steps=study.scale.steps_of_many, may_fail=True)

    def figures(run: Trained) -> dict[str, Any]:
        if not run.finite:
            return {"finite": False}
        return {"finite": True} | study.score(study.draw(study.generator(run)), run) | run.last() | run.thirds()

    results = {run.name: study.measure(run.name, lambda run=run: figures(run)) for run in runs}
    good = [run for run in runs if run.finite]
    for first in range(0, len(good), _PANELS):
        panels = [(titles[run.name], study.draw(study.generator(run), _TILES)) for run in good[first : first + _PANELS]]
        names = "; ".join(title for title, _ in panels)
        study.picture(
            f"samples-{first // _PANELS + 1}", beside(panels, _COLUMNS), f"Samples of the averaged G: {names}."
        )
    shown = study.names | {"convergence": "M", "ratio": "L(G(z)) / L(x)"}
    study.table(
        ("", *(shown.get(name, name) for name in _SHOWN)),
        [(titles[run.name], *(results[run.name].get(name, "not finite") for name in _SHOWN)) for run in runs],
    )
    study.say(
        "Losses, M and k are means over the last tenth of the rows that were logged. Each line is one run with one "
        "seed: what differs as little as runs of two seeds do says nothing (the gallery's `diversity` has three seeds "
        "of one setting)."
    )
    if good:
        study.about_scores([results[run.name] for run in good])
        study.say("Sharpness and variety are relative to the training images, whose own are 1.")
        study.note_alike({titles[run.name]: results[run.name] for run in good})
    return results


def check_finite(study: Study, title: str, run: dict[str, Any]) -> None:
    """Add the check that a run stays finite and that M still falls in its last third; `run` holds its figures."""
    finite = run["finite"]
    study.check(
        f"{title}: all numbers are finite, and M falls from the second third of the run to the last",
        f"M {run['second_third_M']:.3f} and {run['last_third_M']:.3f}, k at most {run['k_max']:.3f}"
        if finite
        else "not finite",
        finite and run["last_third_M"] < run["second_third_M"],
    )


def check_balance(study: Study, title: str, run: dict[str, Any], gamma: float) -> None:
    """Add the check that control keeps L(G(z)) / L(x) of a run within a tenth of gamma; `run` holds its figures."""
    study.check(
        f"{title}: L(G(z)) / L(x) ends within a tenth of gamma, {gamma:g}",
        f"{run['ratio']:.3f}" if run["finite"] else "not finite",
        run["finite"] and abs(run["ratio"] / gamma - 1) < 0.1,
    )
