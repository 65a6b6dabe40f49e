"""Lengths and counts of the experiments, by name of the scale."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Scale:
    """Lengths and counts of an experiment."""

    preset: str
    filters: int | None
    """n; None for the preset's."""
    precision: str
    """As for `fastbegan train`."""
    options: tuple[str, ...]
    """Further options of `fastbegan train`, for every run that it trains."""
    data: str | None
    """The default of --data; None where it has to be given."""
    steps: int
    """Steps of the run of an experiment that trains one."""
    steps_of_many: int
    """Steps of each run of an experiment that trains several."""
    seeds: int
    """Seeds per gamma in `diversity`; `speed` takes one."""
    samples: int
    """Images per side of a comparison."""
    scored: int
    """The same of `scores`."""
    checkpoints: int
    """Number of checkpoints that `convergence` scores; divides `steps`."""
    recovered: int
    """Images whose latents `continuity` recovers."""
    descent: int
    """Steps of each recovery."""
    minutes: float
    """Minutes of each run of `speed`."""
    starved: int
    """The small N_h or N_z of `unbalanced`; 64 is usual."""
    limits: str
    """The limits of the figures, for the report."""


_FIXED = ("--passes", "joint", "--compile", "off")  # measured under load, each run of a table might choose otherwise

SCALES: dict[str, Scale] = {
    "smoke": Scale(
        preset="demo", filters=4, precision="auto", options=(*_FIXED, "--sample-every", "10", "--log-every", "2"),
        data="faces:256", minutes=0.1,
        steps=20, steps_of_many=8, seeds=1, samples=24, scored=24, checkpoints=5, recovered=4, descent=10, starved=2,
        limits="Nothing: runs of a few steps show that the experiment works, and nothing else.",
    ),
    "demo": Scale(
        # float32, though some CPUs have bf16, so that figures of two machines compare
        preset="demo", filters=None, precision="float32", data="faces", minutes=7,
        options=(*_FIXED, *"--log-every 10 --sample-every 250 --checkpoint-every 250".split()),
        steps=3600, steps_of_many=800, seeds=3, samples=500, scored=500, checkpoints=15, recovered=64, descent=400,
        starved=4,
        limits=(
            "Small nets and runs of minutes: this shows which way things go, not how good a BEGAN becomes; figures "
            "compare only with figures of the same table."
        ),
    ),
    "paper": Scale(
        preset="paper-64", filters=None, precision="auto", data=None, minutes=180,
        options=tuple("--checkpoint-every 12500 --sample-every 12500".split()),
        steps=437_500, steps_of_many=437_500, seeds=1, samples=10_000, scored=50_000, checkpoints=35, recovered=64,
        descent=2000, starved=16,
        limits="The nets and the length are the paper's; its 360,000 portraits were never published.",
    ),
}  # fmt: skip
