"""Does M measure the quality of images (paper §4.4)? M over a run, beside scores that training does not use."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import UserError
from ..figures import new_figure, save_figure
from ..nets.models import Generator
from ..runs.checkpoint import list_checkpoints, read_checkpoint
from ..runs.sheets import generate, grid, sheet_latents
from .study import Study
from .training import Trained

_ROWS, _COLUMNS, _LEAST = 4, 9, 5


def ranks_correlate(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's rank correlation of two vectors without ties, -1 to 1."""
    first_ranks, second_ranks = (np.argsort(np.argsort(values)) for values in (first, second))
    return float(np.corrcoef(first_ranks, second_ranks)[0, 1])


def run(study: Study) -> None:
    """Train one run and keep its checkpoints; compare M before each with the scores of its generator."""
    interval = max(1, study.scale.steps // study.scale.checkpoints)
    # a rate that falls lowers M by itself, whatever becomes of the images
    options = ("--lr-fall", 0, "--checkpoint-every", interval, "--keep", study.scale.checkpoints + 1)
    trained = study.train_one("run", options)
    checkpoints = list_checkpoints(trained.folder.checkpoints)
    if len(checkpoints) < _LEAST:
        raise UserError(
            f"{trained.folder.path} has {len(checkpoints)} checkpoints; accepted: from {_LEAST}; train with --keep 100"
        )
    rows = trained.folder.read_metrics()
    steps = [int(checkpoint.name) for checkpoint in checkpoints]
    window = int(np.median(np.diff(steps)))
    table: list[dict[str, float]] = []
    for step, checkpoint in zip(steps, checkpoints, strict=True):
        near = [row for row in rows if step - window < row["step"] <= step]
        if not near:
            raise UserError(
                f"{trained.folder.path} has no row of metrics near step {step}; log more often (--log-every)"
            )
        scores = study.measure(
            f"step-{step}", lambda c=checkpoint: study.score(study.draw(_at(study, trained, c)), trained)
        )
        mean = float(np.mean([row["convergence"] for row in near]))
        table.append({"step": step, "images": near[-1]["images"], "M": mean} | scores)

    columns = ("M", "kernel_distance", "frechet_distance")
    measure, quality, distance = (np.array([row[name] for row in table]) for name in columns)
    by_kernel, by_frechet = ranks_correlate(measure, quality), ranks_correlate(measure, distance)
    half = len(table) // 2
    within = ranks_correlate(measure[half:], quality[half:])
    left = -np.array(steps)
    by_time, by_time_within = ranks_correlate(left, quality), ranks_correlate(left[half:], quality[half:])
    changes = [ranks_correlate(np.diff(measure), np.diff(other)) for other in (quality, distance)]
    _draw(study, trained, checkpoints, rows, table)
    third = max(1, len(table) // 3)
    shown = ("kernel_distance", "frechet_distance", "precision", "recall")
    head = ("step", "M", *(study.names[name] for name in shown))
    study.table(head, [tuple(row[name] for name in ("step", "M", *shown)) for row in table])
    kernel, frechet = study.names["kernel_distance"], study.names["frechet_distance"]
    study.say(
        f"M is the mean over the {window:,} steps before a checkpoint. Rank correlation (Spearman) of M over "
        f"{len(table)} checkpoints: {by_kernel:.2f} with {kernel}, {by_frechet:.2f} with {frechet}; within the second "
        f"half of them {within:.2f} with {kernel}.",
    )
    study.note(
        f"whatever falls while training goes on correlates: the steps that are left do by {by_time:.2f} with {kernel}, "
        f"within the second half by {by_time_within:.2f} (M: {within:.2f})"
    )
    study.note(
        f"time alone would not make changes from one checkpoint to the next correlate; those of M do by "
        f"{changes[0]:.2f} with those of {kernel} and by {changes[1]:.2f} with those of {frechet} (Spearman, "
        f"{len(table) - 1} changes)"
    )
    study.note("one run can show that M tells how far it is, not that M tells which of two runs is better")
    study.about_scores(table)
    early, late = float(measure[:third].mean()), float(measure[-third:].mean())
    study.check("M falls", f"{early:.4f} in the first third of the checkpoints, {late:.4f} in the last", late < early)
    study.check(
        f"M correlates with {study.names['kernel_distance']}: Spearman at least 0.6",
        f"{by_kernel:.2f}",
        by_kernel >= 0.6,
    )
    study.finish(
        "Convergence: what M tells",
        "The paper's §4.4: M = L(x) + |gamma L(x) - L(G(z))| falls while images get better, so a run can be judged "
        "without looking. Here it is held against a distance between features of generated and of training images.",
        {
            "spearman_kernel": by_kernel,
            "spearman_frechet": by_frechet,
            "spearman_kernel_second_half": within,
            "spearman_kernel_of_steps_left": by_time,
            "spearman_kernel_of_steps_left_second_half": by_time_within,
            "spearman_kernel_of_changes": changes[0],
            "spearman_frechet_of_changes": changes[1],
            "checkpoints": table,
        },
    )


def _at(study: Study, trained: Trained, checkpoint: Path) -> Generator:
    """Load the averaged generator of a checkpoint."""
    modules = read_checkpoint(checkpoint, study.device)["modules"]
    generator = Generator(trained.folder.read_config().model).to(study.device)
    generator.load_state_dict(
        {name.removeprefix("average."): value for name, value in modules.items() if name.startswith("average.")}
    )
    return generator.to(memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]


def _draw(
    study: Study, trained: Trained, checkpoints: list[Path], rows: list[dict[str, Any]], table: list[dict[str, float]]
) -> None:
    figure, (upper, lower) = new_figure(rows=2, width=8, height=6.8, ratios=(1, 1.05))
    values = [row["convergence"] for row in rows]
    label = "M of each row of metrics"
    upper.plot([row["images"] for row in rows], values, color="#222222", alpha=0.25, linewidth=1, label=label)
    images, means = [row["images"] for row in table], [row["M"] for row in table]
    upper.plot(images, means, color="#222222", marker="o", markersize=3, label="M, mean before a checkpoint")
    upper.set_ylabel("M")
    upper.set_xlabel("images seen")
    upper.xaxis.set_major_formatter("{x:,.0f}")
    upper.set_ylim(bottom=0)
    other = upper.twinx()
    kernel, label = [row["kernel_distance"] for row in table], study.names["kernel_distance"]
    other.plot(images, kernel, color="#d62728", marker="s", markersize=3, label=label)
    other.set_ylabel(label, color="#d62728")
    other.set_ylim(bottom=0)
    other.spines[["top"]].set_visible(False)
    lines = [*upper.get_lines(), *other.get_lines()]
    upper.legend(lines, [str(line.get_label()) for line in lines], frameon=False, loc="upper right")
    shown = np.unique(np.linspace(0, len(checkpoints) - 1, _COLUMNS).round().astype(int))
    tiles = []
    for number in shown:
        generator = _at(study, trained, checkpoints[number])
        z = sheet_latents(generator.config.latent, study.settings.seed, _ROWS, study.device)
        tiles.append(generate(generator, z))
    picture = grid(np.stack(tiles, 1).reshape(-1, *tiles[0].shape[1:]), len(shown))
    lower.imshow(picture, extent=(0, len(shown), 0, _ROWS), interpolation="nearest")
    lower.set_xticks(np.arange(len(shown)) + 0.5, [f"{table[number]['images']:,.0f}" for number in shown], fontsize=8)
    lower.set_yticks([])
    lower.grid(visible=False)
    lower.spines[:].set_visible(False)
    lower.set_xlabel("images seen when these were drawn, always from the same latents")
    save_figure(study.folder / "convergence.png", figure)
    study.show("convergence.png", f"M, {study.names['kernel_distance']}, and what G draws, over one run.")
