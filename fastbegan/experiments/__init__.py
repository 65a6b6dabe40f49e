"""`fastbegan experiment`: the experiments of the paper's section 4, each one command that leaves a report."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..data.source import absolute
from ..errors import UserError
from ..report import Report
from ..stop import StopRequest
from . import ablation, continuity, convergence, diversity, scores, unbalanced
from .scales import SCALES
from .study import Settings, Study

EXPERIMENTS = {
    module.__name__.rpartition(".")[2]: module.run
    for module in (diversity, continuity, convergence, unbalanced, scores, ablation)
}
_OF_ONE_RUN = ("continuity", "convergence", "scores")


def experiment(
    name: str,
    *,
    scale: str = "demo",
    out: Path | None = None,
    data: str | None = None,
    trained: Path | None = None,
    seed: int = 0,
    seeds: int | None = None,
    extractor: str = "efficientnet-lite0",
    inception: Path | None = None,
    device: str = "auto",
) -> int:
    """Do one of EXPERIMENTS in a folder: report.md, results.json, pictures, and the runs it trained.

    Started again with the same settings, it goes on where it was. Raises UserError for bad input.
    """
    if name not in EXPERIMENTS:
        raise UserError(f"experiment is {name!r}; accepted: {', '.join(EXPERIMENTS)}")
    if scale not in SCALES:
        raise UserError(f"scale is {scale!r}; accepted: {', '.join(SCALES)}")
    if seed < 0:
        raise UserError(f"seed is {seed}; accepted: whole numbers from 0")
    if seeds is not None and (seeds < 1 or name != "diversity"):
        raise UserError(f"seeds is {seeds} for {name}; accepted: whole numbers from 1, for diversity")
    if trained is not None and name not in _OF_ONE_RUN:
        raise UserError(f"trained is {trained} for {name}; accepted: with {', '.join(_OF_ONE_RUN)}")
    if trained is not None and data is not None:
        raise UserError(f"data is {data!r} beside trained; accepted: one of them, a run knows its data")
    settings = Settings(
        name=name, scale=scale, data=absolute(data or SCALES[scale].data),
        trained=None if trained is None else str(trained.resolve()), seed=seed,
        seeds=SCALES[scale].seeds if seeds is None else seeds, extractor=extractor,
        inception=None if inception is None else str(inception.resolve()),
    )  # fmt: skip
    folder = out or Path("experiments") / f"{name}-{scale}"
    given = {"out": out, "data": data, "trained": trained, "seeds": seeds, "inception": inception}
    options = [part for option, value in given.items() if value is not None for part in (f"--{option}", str(value))]
    options += ["--seed", str(seed)] if seed else []
    options += ["--extractor", extractor] if inception else []
    with Report() as report, StopRequest():  # which makes a SIGTERM a KeyboardInterrupt, and so ends the runs too
        study = Study(settings, folder, device, report)
        study.command = shlex.join(["fastbegan", "experiment", name, "--scale", scale, *options])
        try:
            EXPERIMENTS[name](study)
        finally:
            study.save()
    return 0
