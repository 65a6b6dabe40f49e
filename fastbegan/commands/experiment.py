"""`fastbegan experiment`: the experiments of the paper's section 4, each of which writes a report."""

from __future__ import annotations

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tyro.conf import Positional

from ..data.source import absolute, find_source
from ..device import pick_device
from ..display import Display
from ..distributed.stop import StopRequest
from ..errors import UserError
from ..evaluation.extractors import open_extractor
from ..experiments import ablation, continuity, convergence, diversity, nearest, scores, speed, unbalanced
from ..experiments.record import FILE, Settings
from ..experiments.scales import SCALES
from ..experiments.study import OF_MANY_SEEDS, OF_ONE_RUN, Study
from ..fields import require_seed
from ..files import locked, make_folder, sha256, visible
from ..runs.folder import RunFolder


@dataclass(frozen=True)
class Experiment:
    """Repeat an experiment of the paper (its section 4), or measure its speed: train the runs it needs and write a
    report."""

    name: Positional[
        Literal["diversity", "continuity", "convergence", "unbalanced", "scores", "ablation", "nearest", "speed"]
    ]
    """diversity (gamma), continuity (latents of real images), convergence (M against quality), unbalanced (a starved D
    or G), scores (of generated images), ablation (skips, vanishing residuals, updates, latents), nearest
    (training images beside samples), speed (minutes to the quality of the textbook step)."""
    scale: Literal["demo", "paper", "smoke"] = "demo"
    """demo: minutes on two cores; paper: the paper's nets and lengths, for GPUs; smoke: shows only that it works."""
    out: Path | None = None
    """The folder. One that holds this experiment is resumed. Default: experiments/NAME-SCALE."""
    data: str | None = None
    """As --data of train. Default: faces; paper scale has no default."""
    trained: Path | None = None
    """A run folder to use instead of training a run (continuity, convergence, scores, nearest)."""
    seed: int = 0
    """All random numbers follow from it."""
    seeds: int | None = None
    """Number of seeds, from `seed` on, for diversity and speed. Default: the scale's, and 1 for speed."""
    extractor: Literal["efficientnet-lite0", "inception"] = "efficientnet-lite0"
    """As for evaluate."""
    inception: Path | None = None
    """As for evaluate."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    any_code: bool = False
    """Resume a folder that another version of the code, or another kind of device, has begun; the report says so."""

    def run(self) -> int:
        return experiment(self)


EXPERIMENTS = {
    module.__name__.rpartition(".")[2]: module.run
    for module in (diversity, continuity, convergence, unbalanced, scores, ablation, nearest, speed)
}


def experiment(options: Experiment) -> int:
    """Run one of EXPERIMENTS; it leaves report.md, results.json, pictures, and its training runs in a folder.

    Started again with the same settings, it resumes. Returns the exit code. Raises UserError for bad options, and for
    a folder of another experiment.
    """
    name, scale, seed, trained = options.name, options.scale, options.seed, options.trained
    data, seeds = options.data, options.seeds
    if name not in EXPERIMENTS:
        raise UserError(f"experiment is {name!r}; accepted: {', '.join(EXPERIMENTS)}")
    if scale not in SCALES:
        raise UserError(f"scale is {scale!r}; accepted: {', '.join(SCALES)}")
    require_seed(seed)
    if seeds is not None and (seeds < 1 or name not in OF_MANY_SEEDS):
        raise UserError(f"seeds is {seeds} for {name}; accepted: whole numbers from 1, for {', '.join(OF_MANY_SEEDS)}")
    if trained is not None and name not in OF_ONE_RUN:
        raise UserError(f"trained is {trained} for {name}; accepted: with {', '.join(OF_ONE_RUN)}")
    if trained is not None and data is not None:
        raise UserError(f"data is {data!r} beside trained; accepted: one of them, a run knows its data")
    if name == "continuity" and (options.inception is not None or options.extractor != "efficientnet-lite0"):
        raise UserError("extractor and inception were given for continuity, which compares no features; leave them out")
    weights = None
    if trained is not None:
        RunFolder(trained).load_generator()  # fails now where the run has no generator
        weights = sha256(RunFolder(trained).generator_file)
    else:
        data = data or SCALES[scale].data
        if data is None:
            raise UserError(f"data is missing; at {scale} scale give --data, as for train, or --trained RUN")
        data = absolute(data)
        if Path(data).suffix != ".pack" or not Path(data).is_file():
            find_source(data)
    folder = options.out or Path("experiments") / f"{name}-{scale}"
    if folder.is_file() or (visible(folder) and not (folder / FILE).exists()):
        raise UserError(f"{folder} is a file, or not empty and no experiment; give another --out")
    device, _ = pick_device(options.device)
    scored = name != "continuity"
    # opened before hours of training, since it may fail
    extractor = open_extractor(options.extractor, options.inception, device) if scored else None
    if name == "diversity" and seeds is None:
        seeds = SCALES[scale].seeds
    settings = Settings(
        name=name,
        scale=scale,
        data=data,
        trained=None if trained is None else str(trained.resolve()),
        weights=weights,
        seed=seed,
        seeds=seeds,
        extractor=options.extractor if scored else None,
    )
    make_folder(folder)
    # StopRequest turns SIGTERM into KeyboardInterrupt, so the training runs end too
    with Display() as display, StopRequest(), locked(folder / "study", lambda: display.say(_waiting(folder))) as lock:
        study = Study(settings, folder, device, extractor, display, lock, any_code=options.any_code)
        study.command = _command(options)
        try:
            EXPERIMENTS[name](study)
        finally:
            study.record.save()
    return 0


def _command(options: Experiment) -> str:
    """The command line that repeats this experiment, for its report."""
    words = ["fastbegan", "experiment", options.name, "--scale", options.scale]
    for name in ("out", "data", "trained", "seeds", "inception"):
        if (value := getattr(options, name)) is not None:
            words += [f"--{name}", str(value)]
    words += ["--seed", str(options.seed)] if options.seed else []
    words += ["--extractor", options.extractor] if options.inception else []
    words += ["--device", options.device] if options.device != "auto" else []
    words += ["--any-code"] if options.any_code else []
    return shlex.join(words)


def _waiting(folder: Path) -> str:
    return f"another process, or a run that one has left behind, is at work in {folder}; waiting for it to end"
