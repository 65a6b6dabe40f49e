"""`fastbegan experiment`: the experiments of the paper's section 4, each one command that leaves a report."""

from __future__ import annotations

import shlex
from pathlib import Path

from ..config import require_seed
from ..data.source import absolute, find_source
from ..device import pick_device
from ..display import Display
from ..distributed.stop import StopRequest
from ..errors import UserError
from ..evaluation.extractors import open_extractor
from ..files import locked, make_folder, sha256, visible
from ..runs.folder import RunFolder
from . import ablation, continuity, convergence, diversity, scores, unbalanced
from .scales import SCALES
from .study import FILE, OF_ONE_RUN, Settings, Study

EXPERIMENTS = {
    module.__name__.rpartition(".")[2]: module.run
    for module in (diversity, continuity, convergence, unbalanced, scores, ablation)
}


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
    any_code: bool = False,
) -> int:
    """Do one of EXPERIMENTS in a folder: report.md, results.json, pictures, and the runs it trained.

    Started again with the same settings, it goes on where it was; with `any_code` also if another version of the code,
    or another kind of device, was at work there, which the report then says. Raises UserError for bad input.
    """
    asked, asked_seeds = data, seeds
    if name not in EXPERIMENTS:
        raise UserError(f"experiment is {name!r}; accepted: {', '.join(EXPERIMENTS)}")
    if scale not in SCALES:
        raise UserError(f"scale is {scale!r}; accepted: {', '.join(SCALES)}")
    require_seed(seed)
    if seeds is not None and (seeds < 1 or name != "diversity"):
        raise UserError(f"seeds is {seeds} for {name}; accepted: whole numbers from 1, for diversity")
    if trained is not None and name not in OF_ONE_RUN:
        raise UserError(f"trained is {trained} for {name}; accepted: with {', '.join(OF_ONE_RUN)}")
    if trained is not None and data is not None:
        raise UserError(f"data is {data!r} beside trained; accepted: one of them, a run knows its data")
    if name == "continuity" and (inception is not None or extractor != "efficientnet-lite0"):
        raise UserError("extractor and inception were given for continuity, which compares no features; leave them out")
    weights = None
    if trained is not None:
        RunFolder(trained).load_generator()  # before anything is made for it
        weights = sha256(RunFolder(trained).generator_file)
    else:
        data = data or SCALES[scale].data
        if data is None:
            raise UserError(f"data is missing; at {scale} scale give --data, as for train, or --trained RUN")
        data = absolute(data)
        if Path(data).suffix != ".pack" or not Path(data).is_file():
            find_source(data)
    folder = out or Path("experiments") / f"{name}-{scale}"
    if folder.is_file() or (visible(folder) and not (folder / FILE).exists()):
        raise UserError(f"{folder} is a file, or not empty and no experiment; give another --out")
    place = pick_device(device)[0]
    net = None if name == "continuity" else open_extractor(extractor, inception, place)  # before hours of training
    if name == "diversity" and seeds is None:
        seeds = SCALES[scale].seeds
    settings = Settings(
        name=name, scale=scale, data=data, trained=None if trained is None else str(trained.resolve()), weights=weights,
        seed=seed, seeds=seeds, extractor=None if name == "continuity" else extractor,
    )  # fmt: skip
    given = {"out": out, "data": asked, "trained": trained, "seeds": asked_seeds, "inception": inception}
    options = [part for option, value in given.items() if value is not None for part in (f"--{option}", str(value))]
    options += ["--seed", str(seed)] if seed else []
    options += ["--extractor", extractor] if inception else []
    options += ["--device", device] if device != "auto" else []
    options += ["--any-code"] if any_code else []
    make_folder(folder)
    # a SIGTERM is a KeyboardInterrupt in here, and so ends the runs too
    with Display() as display, StopRequest(), locked(folder / "study", lambda: display.say(_waiting(folder))) as lock:
        study = Study(settings, folder, place, net, display, lock, any_code=any_code)
        study.command = shlex.join(["fastbegan", "experiment", name, "--scale", scale, *options])
        try:
            EXPERIMENTS[name](study)
        finally:
            study.save()
    return 0


def _waiting(folder: Path) -> str:
    return f"another process, or a run that one has left behind, is at work in {folder}; waiting for it to end"
