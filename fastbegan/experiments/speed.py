"""Time to quality: the same run by the textbook step, by torch.compile of it, and by ours, turn by turn."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..config import PRESETS
from ..data.choose import open_loader
from ..device import pick_precision
from ..display import Display, duration
from ..errors import UserError
from ..figures import new_figure, save_figure
from ..runs.folder import RunConfig, RunFolder
from ..runs.sheets import save_png
from .pictures import beside
from .race import LOG_EVERY, QUIET, SMOOTHED, Racer, seconds_to, smoothed
from .study import Study
from .training import Trained

WAYS: dict[str, dict[str, Any]] = {
    "textbook": {"passes": "textbook", "compile": "off", "cuda_graph": "off"},
    "textbook compiled": {"passes": "textbook", "compile": "default"},
    "ours": {"passes": "auto", "compile": "default"},
}
OTHERS = ("textbook", "textbook compiled")
_COLOURS = {"textbook": "#7f7f7f", "textbook compiled": "#ff7f0e", "ours": "#1f77b4"}
_TURN = 5.0  # seconds
_MARKS = 6  # times at which images are scored, evenly spaced
_SCORES = ("frechet_distance", "kernel_distance")
_REPORT = 30.0  # seconds between lines of progress
_NEVER = 10**9
Marks = list[tuple[float, dict[str, Tensor]]]
"""Seconds, and the weights of the averaged generator then."""
_TILES, _COLUMNS = 24, 4
_LEVELS = (0.25, 0.5, 0.75, 1.0)  # shares of the textbook's time, whose M is the goal of a row


def run(study: Study) -> None:
    """Train by all WAYS for the same minutes, once a seed; plot M and a distance from the data against minutes."""
    first = study.settings.seed
    seeds = range(first, first + (study.settings.seeds or 1))
    races = {seed: study.measure(f"seed-{seed}", lambda seed=seed: _race(study, seed)) for seed in seeds}
    study.note_settings(RunFolder(_folder(study, "ours", first)))
    distance = study.names["frechet_distance"]
    _draw(study, races, distance)
    study.show("speed.png", f"M and {distance} against minutes; a line each seed. Compilation counts.")
    study.show(f"samples-{first}.png", f"What each draws after {study.scale.minutes:g} minutes, seed {first}.")
    levels = {seed: minutes_to_levels(race) for seed, race in races.items()}
    study.say(f"Minutes until M, a mean over {SMOOTHED * LOG_EVERY} steps, is as low as the textbook step gets it:")
    study.table(
        ("seed", "M", *WAYS, *(f"ours / {way}" for way in OTHERS)),
        [
            (
                seed,
                row["M"],
                *(row[way] or "not reached" for way in WAYS),
                *(ratio_of_minutes(row, way, study.scale.minutes)[1] for way in OTHERS),
            )
            for seed, rows in levels.items()
            for row in rows
        ],
    )
    study.table(
        ("seed", "way", "steps", "ms a step", "first step, s", *(study.names[name] for name in _SCORES)),
        [_row(seed, way, race[way]) for seed, race in races.items() for way in WAYS],
    )
    study.say(
        "The first step holds set-up and compilation; Inductor's cache is empty. Milliseconds are a median over rows "
        f"of {LOG_EVERY} steps, scores those of the last images. The learning rate stays as it is at first. All nets "
        "and images are channels_last."
    )
    for way in OTHERS:
        ratios = [ratio_of_minutes(rows[-1], way, study.scale.minutes) for rows in levels.values()]
        study.check(
            f"ours reaches the lowest M of the textbook sooner than {way} does, with every seed",
            f"{', '.join(text for _, text in ratios)} of its minutes",
            all(ratio is not None and ratio < 1 for ratio, _ in ratios),
        )
    study.say(*(f"- {way}: {row['settings']}" for way, row in races[first].items()))
    study.finish(
        "Speed: the same quality in less time",
        "Not in the paper. The same nets, images and seed are trained for the same minutes in three ways: the step as "
        "the paper's formulas stand, in eager PyTorch (`textbook`); torch.compile of it; and `fastbegan train`. They "
        f"take turns of {_TURN:g} seconds. Their gradients are equal up to rounding, so what differs is the number of "
        "steps.",
        {"levels": levels, "races": races},
    )


def _row(seed: int, way: str, figures: dict[str, Any]) -> tuple[object, ...]:
    last = figures["marks"][-1]
    times = figures["ms"] or "too few", figures["first_step"]
    return seed, way, f"{figures['steps']:,}", *times, *(last[name] for name in _SCORES)


def ratio_of_minutes(minutes: Mapping[str, float | None], way: str, limit: float) -> tuple[float | None, str]:
    """Our minutes over another way's, and as text; a bound where only ours got there in `limit` minutes."""
    ours, other = minutes["ours"], minutes[way]
    if ours is None:
        return None, "not reached"
    return (ours / other, f"{ours / other:.3g}") if other is not None else (ours / limit, f"under {ours / limit:.3g}")


def _race(study: Study, seed: int) -> dict[str, Any]:
    """The figures of all ways with one seed."""
    limit = 60 * study.scale.minutes
    with _no_compiled_code(), Display(quiet=True) as quiet, contextlib.ExitStack() as closing:
        configs = {way: _config(study, seed, changes) for way, changes in WAYS.items()}
        some = next(iter(configs.values()))
        # packs before a clock starts
        closing.enter_context(
            contextlib.closing(open_loader(some.train, some.model.size, study.device, study.display.preparing)[0])
        )
        racers = {way: Racer.set_up(configs[way], _folder(study, way, seed), quiet, closing) for way in WAYS}
        marks: dict[str, Marks] = {way: [] for way in WAYS}
        reported = time.monotonic()
        while any(racer.seconds < limit or not racer.clock for racer in racers.values()):
            way, racer = min(racers.items(), key=lambda entry: entry[1].seconds if entry[1].clock else 0.0)
            racer.turn(min(racer.seconds + _TURN, limit))
            if racer.seconds >= limit * (len(marks[way]) + 1) / _MARKS or not marks[way]:
                average = racer.training.step.average.state_dict()
                marks[way].append((racer.seconds, {name: value.clone() for name, value in average.items()}))
            if time.monotonic() - reported > _REPORT:
                reported = time.monotonic()
                steps = (f"{way} {len(racer.clock):,}" for way, racer in racers.items())
                study.display.say(f"seed {seed}, {duration(racer.seconds)} each: {', '.join(steps)} steps")
        panels = [(f"{way}, {len(racer.clock):,} steps", _samples(study, racer)) for way, racer in racers.items()]
        save_png(study.folder / f"samples-{seed}.png", beside(panels, _COLUMNS))
        return {way: _figures(study, racer, marks[way]) for way, racer in racers.items()}


@contextlib.contextmanager
def _no_compiled_code() -> Iterator[None]:
    """Inductor has nothing cached inside, neither on disk nor in memory: compilation is part of what is measured."""
    from torch._inductor import utils  # here, as it takes a while

    fresh = getattr(utils, "fresh_cache", None) or utils.fresh_inductor_cache  # its name before torch 2.8
    torch.compiler.reset()
    with fresh():
        yield
    torch.compiler.reset()


def _config(study: Study, seed: int, changes: dict[str, Any]) -> RunConfig:
    preset, scale = PRESETS[study.scale.preset], study.scale
    train = replace(
        preset.train,
        data=study.settings.data,
        device=str(study.device),
        seed=seed,
        images=None,
        steps=_NEVER,
        lr_fall=0.0,
        precision=pick_precision(scale.precision, study.device)[0],  # the same for all
        log_every=LOG_EVERY,
        **QUIET,
        **changes,
    )
    return RunConfig(scale.preset, preset.model.resized(None, scale.filters), train)


def _folder(study: Study, way: str, seed: int) -> Path:
    return study.folder / "runs" / f"{way.replace(' ', '-')}-seed-{seed}"


def _samples(study: Study, racer: Racer) -> np.ndarray:
    return study.draw(copy.deepcopy(racer.training.step.average).eval(), _TILES)


def _figures(study: Study, racer: Racer, marks: Marks) -> dict[str, Any]:
    """What a way has done: M against seconds, scores at the marks, times."""
    training = racer.training
    seconds, convergence = racer.convergence()
    trained = Trained(training.folder.path.name, training.folder)
    generator = copy.deepcopy(training.step.average).eval()
    scored = []
    for then, weights in marks:
        generator.load_state_dict(weights)
        scores = study.score(study.draw(generator), trained)
        scored.append({"seconds": then} | {name: scores[name] for name in _SCORES})
    if training.place.compile_mode is not None and not training.step.objective.compiled:
        raise UserError(f"torch.compile failed in {training.folder.path}, so there is nothing to compare with")
    of_rows = np.diff(seconds) / LOG_EVERY
    train = training.config.train
    return {
        "settings": f"{training.step.describe()}; {training.place.compile_line}; {train.precision}",
        "steps": len(racer.clock),
        "images": training.progress.images,
        "ms": 1e3 * float(np.median(of_rows)) if len(of_rows) else None,
        "first_step": racer.clock[0],
        "seconds": seconds,
        "M": convergence,
        "marks": scored,
    }


def minutes_to_levels(race: dict[str, Any], shares: Sequence[float] = _LEVELS) -> list[dict[str, float | None]]:
    """For each share of the textbook's time, the M that it had reached then, and each way's minutes until that M."""
    textbook, rows = race["textbook"], []
    if not textbook["M"]:
        raise UserError(f"the textbook took under {LOG_EVERY} steps in its time; give the machine more of it")
    for share in shares:
        until = int(np.searchsorted(textbook["seconds"], share * textbook["seconds"][-1], side="right"))
        level = float(smoothed(textbook["M"])[: max(1, until)].min())
        seconds = {way: seconds_to(level, race[way]["seconds"], race[way]["M"]) for way in WAYS}
        rows.append({"M": level} | {way: None if value is None else value / 60 for way, value in seconds.items()})
    return rows


def _draw(study: Study, races: Mapping[int, dict[str, Any]], distance: str) -> None:
    figure, (upper, lower) = new_figure(rows=2, width=8, height=7, share_x=True)
    for number, race in enumerate(races.values()):
        for way, row in race.items():
            style = {"color": _COLOURS[way], "label": way if number == 0 else None, "alpha": 0.85}
            upper.plot(np.array(row["seconds"]) / 60, smoothed(row["M"]), linewidth=1.4, **style)
            marks = row["marks"]
            times, scores = ([mark[name] for mark in marks] for name in ("seconds", "frechet_distance"))
            lower.plot(np.array(times) / 60, scores, marker="o", markersize=3, linewidth=1.2, **style)
    upper.set_yscale("log")
    upper.set_ylabel("M")
    lower.set_ylabel(distance)
    lower.set_ylim(bottom=0)
    lower.set_xlabel("minutes of training, compilation included")
    upper.legend(frameon=False)
    save_figure(study.folder / "speed.png", figure)
