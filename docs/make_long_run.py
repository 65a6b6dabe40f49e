"""The generator that comes with the package, and its page in the gallery: python docs/make_long_run.py.

Both come from runs/demo-64, the run of `fastbegan train --preset demo-64 --out runs/demo-64`.
"""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from fastbegan.commands.sample import DEMO
from fastbegan.data.decode import Decoding
from fastbegan.data.prepare import load_images
from fastbegan.device import core_count
from fastbegan.display import duration
from fastbegan.evaluation.scores import Yardstick, names
from fastbegan.experiments.page import Page
from fastbegan.files import write_json
from fastbegan.measure.machine import facts
from fastbegan.runs.checkpoint import load_latest
from fastbegan.runs.folder import RunFolder
from fastbegan.runs.sheets import generate, grid, interpolate_latents, save_gif, sheet_latents

ROOT = Path(__file__).resolve().parents[1]
RUN, TARGET = RunFolder(ROOT / "runs" / "demo-64"), ROOT / "docs" / "gallery" / "demo-64"
COMMAND = "fastbegan train --preset demo-64 --out runs/demo-64"
_SHEET, _COLUMNS, _ROWS, _STEPS, _SCORED = 60, 10, 6, 10, 2000


def page() -> None:
    """Write docs/gallery/demo-64/: pictures, figures, report.md and results.json."""
    config, rows, device = RUN.read_config(), RUN.read_metrics(), torch.device("cpu")
    state = load_latest(RUN.checkpoints, device)
    assert state is not None
    seconds, machine = state["seconds"], facts(device) | {"cores": core_count()}
    generator, latent = RUN.load_generator(), config.model.latent
    shutil.rmtree(TARGET, ignore_errors=True)
    TARGET.mkdir(parents=True)
    report = Page(TARGET)
    drawn = generate(generator, sheet_latents(latent, 0, _SCORED))
    report.picture("samples", grid(drawn[:_SHEET], _COLUMNS), "Samples of the averaged G, not chosen.")
    ways = generate(generator, interpolate_latents(sheet_latents(latent, 0, _ROWS + 1), _STEPS).flatten(0, 1))
    report.picture("ways", grid(ways, _STEPS), "Ways from one z to the next, a row each.")
    frames = ways.reshape(_ROWS, _STEPS, *ways.shape[1:])
    there_and_back = [*range(_STEPS), *range(_STEPS - 2, 0, -1)]
    save_gif(TARGET / "ways.gif", [grid(frames[:, number], _ROWS) for number in there_and_back], 90)
    report.show("ways.gif", "The same as an animation.")
    for name, source in (("sheet.png", RUN.sheet_file(state["step"])), ("curves.png", RUN.curves_file)):
        shutil.copyfile(source, TARGET / name)
    report.show("sheet.png", "The last sheet of the run: data, what D makes of it, samples, what D makes of those.")
    report.show("curves.png", "M, losses and k over the run.")
    images = load_images(config.train.data, config.model.size, Decoding(config.train.crop), lambda *_: None).images
    chosen = np.random.default_rng(0).permutation(len(images))[:_SCORED]
    scores = Yardstick(images[np.sort(chosen)]).score(drawn)
    named = names("efficientnet-lite0")
    shown = ("sharpness", "variety", "frechet_distance", "kernel_distance", "precision", "recall")
    report.table(("", *(named[name] for name in shown)), [(f"{_SCORED:,} samples", *(scores[n] for n in shown))])
    report.note(", ".join(f"{named[name]} {scores[name]:.3g}" for name in shown[:3]))
    rate = rows[-1]["images"] / seconds
    length = f"{rows[-1]['images']:,} images in {duration(seconds)} of training, {rate:.0f} images/s"
    measured = f"{machine['device']}, {machine['cores']} cores, {machine['date']}, torch {machine['torch']}"
    summary = (
        "The preset demo-64, trained on a CPU; its generator comes with the package. The run was cut into four parts, "
        "and other programs ran beside some of it. Short and half-long hair is drawn; long hair, which many of "
        "the data's faces have, is not: the variety below says that about half of the data's is there."
    )
    settings = f"{config.train.precision}, {config.train.passes} passes"
    head = ["# A long run", summary, f"```sh\n{COMMAND}\n```", f"Measured on {measured}: {length}; {settings}."]
    report.write(head, ["The faces are drawn by a program: photographs vary in more ways, and need larger nets."])
    content = {"command": COMMAND, "settings": {"seed": config.train.seed}, "seconds": round(seconds, 1)}
    content |= {"machine": machine, "checks": [], "findings": report.findings, "results": scores}
    write_json(TARGET / "results.json", content)
    demo(f"{length} ({measured})", scores)


def demo(length: str, scores: dict[str, float]) -> None:
    """Make fastbegan/demo: the run folder without what only training needs."""
    for file in (RUN.config_file, RUN.generator_file):
        shutil.copyfile(file, DEMO / file.name)
    (DEMO / "README.md").write_text(
        f"""The generator that `fastbegan sample` uses when no run is given: drawn faces of 64 pixels.

```sh
{COMMAND}
```

made it: {length}.
{_SCORED:,} of its images have sharpness {scores["sharpness"]:.2f} and variety {scores["variety"]:.2f} of the data's,
and FD (EfficientNet-Lite0) {scores["frechet_distance"]:.0f}. `docs/gallery/demo-64` shows them. This is a run folder as
any other, without what only training needs.
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    if not RUN.generator_file.exists():
        print(f"error: {RUN.path} holds no finished run; make one: {COMMAND}", file=sys.stderr)
        sys.exit(2)
    page()
