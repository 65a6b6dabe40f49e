"""Is the generator continuous, and does it cover real images (paper §4.3)? Latents of images, and lines between."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..errors import UserError
from ..nets.models import Generator
from ..runs.sheets import generate, grid, save_gif, sheet_latents
from .pictures import below, beside
from .study import Study

_RANDOM, _PAIRS, _FRAMES, _TILES, _MOVES = 256, 6, 10, 10, 31
_JUMP = 5  # a move that changes the picture over so many times as much as the mean move counts as a jump
_AT_ONCE = 32  # images of a batch, for memory
_RATE, _LAST_RATE = 0.1, 0.005  # first and last learning rate, geometric in between


def recover(generator: Generator, images: Tensor, start: Tensor, steps: int) -> Tensor:
    """Search latents whose images come close to given ones, by Adam on |x - G(z)|.

    Args:
        generator: The net G.
        images: float32 [N, 3, H, W] in [-1, 1].
        start: First latents: float32 [N, latent].
        steps: Steps of Adam; each clamps z to [-1, 1].

    Returns:
        float32 [N, latent]: per image, the z of all steps whose image was nearest.
    """
    z = start.clone().requires_grad_(True)
    optimizer = torch.optim.Adam([z], lr=_RATE)
    packed = {name: weight.detach() for name, weight in generator.pack().items()}
    best, least = start.clone(), torch.full((len(z),), torch.inf, device=z.device)
    for step in range(steps + 1):
        errors = _errors(generator(z, packed), images)
        nearer = errors.detach() < least
        best[nearer], least[nearer] = z.detach()[nearer], errors.detach()[nearer]
        if step == steps:
            break
        for group in optimizer.param_groups:
            group["lr"] = _RATE * (_LAST_RATE / _RATE) ** (step / steps)
        (z.grad,) = torch.autograd.grad(errors.sum(), z)
        optimizer.step()
        with torch.no_grad():
            z.clamp_(-1, 1)
    return best


def run(study: Study) -> None:
    """Recover latents of images, seen in training and not, and of mirror images; draw the lines between them."""
    trained = study.train_one("run")
    generator = study.generator(trained).requires_grad_(False)
    pixels = study.some_real(trained, study.scale.recovered)
    if len(pixels) < 2:
        raise UserError(
            f"{trained.folder.path} was trained on {len(pixels)} image; accepted: from 2, to go between them"
        )
    unseen = study.unseen(trained, len(pixels))
    count, latent = len(pixels), generator.config.latent
    sets = [pixels, pixels[:, :, ::-1], *([] if unseen is None else [unseen])]
    images = torch.from_numpy(np.concatenate(sets)).permute(0, 3, 1, 2).to(study.device).float().div(127.5).sub(1)
    pairs = min(_PAIRS, count // 2)
    # another seed than that of the random latents, with which the result is compared
    start = sheet_latents(latent, study.settings.seed + 1, len(images), study.device)

    def figures() -> dict[str, Any]:
        parts = zip(images.split(_AT_ONCE), start.split(_AT_ONCE), strict=True)
        z = torch.cat([recover(generator, part, first, study.scale.descent) for part, first in parts])
        candidates = sheet_latents(latent, study.settings.seed, _RANDOM, study.device)
        with torch.no_grad():
            drawn, random = (
                torch.cat([generator(part) for part in latents.split(_AT_ONCE)]) for latents in (z, candidates)
            )
            errors, random = _errors(drawn, images), random.flatten(1)
            distances = torch.cdist(images.flatten(1), random, p=1) / random.shape[1]
        return {
            "z": z.cpu().double().numpy().round(6).tolist(),
            "error": errors.tolist(),
            "mean_image": _errors(images[:count].mean(0, keepdim=True), images).tolist(),
            "random_best": distances.min(1).values.tolist(),
            "random_mean": distances.mean(1).tolist(),
            "largest_move": _largest_move(generator, z[: 2 * pairs : 2], z[1 : 2 * pairs : 2]),
            "largest_move_mirrored": _largest_move(generator, z[:pairs], z[count : count + pairs]),
        }

    results = study.measure("latents", figures)
    z = torch.tensor(results["z"], dtype=torch.float32, device=study.device)
    figure = {name: np.array(results[name]) for name in ("error", "random_best", "random_mean", "mean_image")}
    groups = {"training images": slice(count), "their mirror images": slice(count, 2 * count)}
    groups |= {} if unseen is None else {"images it was not trained on": slice(2 * count, None)}

    drawn = generate(generator, z)
    panels = [
        panel
        for (name, part), shown in zip(groups.items(), sets, strict=True)
        for panel in ((name, shown[:_TILES]), ("G(z) of the z found for them", drawn[part][:_TILES]))
    ]
    study.say(
        f"z of {count} images each by {study.scale.descent:,} steps of Adam on |x - G(z)| from a random start, put "
        "back into [-1, 1] after every step:"
    )
    study.picture("recovered", below(panels, _TILES), "Images, and what G makes of the z found for them.")
    between = _ways(generator, z[: 2 * pairs : 2], z[1 : 2 * pairs : 2], _FRAMES)
    study.picture(
        "between",
        _strip(pixels[: 2 * pairs : 2], between, pixels[1 : 2 * pairs : 2], "other"),
        "Ways between two images, from the z found for the one to the z found for the other.",
    )
    mirrored = _ways(generator, z[:pairs], z[count : count + pairs], _FRAMES)
    study.picture(
        "mirror",
        _strip(pixels[:pairs], mirrored, pixels[:pairs, :, ::-1], "mirror"),
        "Ways between an image and its mirror image.",
    )
    frames = np.concatenate((between, mirrored))
    there_and_back = [*range(_FRAMES), *range(_FRAMES - 2, 0, -1)]
    save_gif(study.folder / "ways.gif", [grid(frames[:, number], pairs) for number in there_and_back], 90)
    study.show("ways.gif", "The same as an animation; above between images, below between mirror images.")
    numbers: dict[str, Any] = {"reconstructed": trained.last()["loss_real"]}
    for name, part in groups.items():
        error, best, mean = (figure[key][part] for key in ("error", "random_best", "mean_image"))
        numbers[name] = {key: float(values[part].mean()) for key, values in figure.items()} | {
            "factor": float(np.median(best / error)),
            "nearer_than_random": float((error < best).mean()),
            "nearer_than_mean_image": float((error < mean).mean()),
        }
        row = numbers[name]
        study.check(
            f"{name}: z found is nearer than the best of {_RANDOM} random ones for at least 90 %",
            f"for {row['nearer_than_random']:.0%}, {row['factor']:.2f} times as near (median)",
            row["nearer_than_random"] >= 0.9,
        )
        study.check(
            f"{name}: z found is nearer than the mean of the training images for at least 90 %",
            f"for {row['nearer_than_mean_image']:.0%}",
            row["nearer_than_mean_image"] >= 0.9,
        )
    titles = {
        "error": "z found",
        "random_best": f"best of {_RANDOM} random z",
        "mean_image": "the mean of the training images",
        "random_mean": "random z",
    }
    study.table(
        ("mean distance per value in [-1, 1] to", *groups),
        [(title, *(numbers[group][name] for group in groups)) for name, title in titles.items()],
    )
    study.say(
        f"For comparison: D, with an encoder, reconstructed training images to {numbers['reconstructed']:.3f} at the "
        "end of training."
    )
    numbers["at_the_walls"] = at_walls = float((z.abs() == 1).float().mean())
    study.note(f"{at_walls:.0%} of the numbers of the z found lie at -1 or 1, where the search is put back")
    for key, ways in (("largest_move", "two images"), ("largest_move_mirrored", "an image and its mirror image")):
        numbers[key] = largest = float(np.max(results[key]))
        study.check(
            f"on the ways between {ways}, no move of z changes the picture over {_JUMP} times as much as the mean one",
            f"the largest of {_MOVES} moves {largest:.1f} times (a jump would be {_MOVES} times)",
            largest <= _JUMP,
        )
    study.finish(
        "Continuity: latents of real images, and the ways between them",
        "The paper's §4.3: images have latents near which G draws them, and the lines between those latents give "
        "images all along. Images that G was never trained on tell more than training images: those it may know by "
        "heart.",
        numbers,
    )


def _errors(drawn: Tensor, images: Tensor) -> Tensor:
    """Mean |x - G(z)| per image: [N]."""
    return (images - drawn).abs().flatten(1).mean(1)


def _ways(generator: Generator, start: Tensor, end: Tensor, frames: int) -> np.ndarray:
    """Images along the lines between rows of latents: uint8 [N, frames, H, W, 3]."""
    weights = torch.linspace(0, 1, frames, device=start.device)[None, :, None]
    images = generate(generator, torch.lerp(start[:, None], end[:, None], weights).flatten(0, 1))
    return images.reshape(len(start), frames, *images.shape[1:])


def _largest_move(generator: Generator, start: Tensor, end: Tensor) -> list[float]:
    """Per line, the largest change of the picture by one of equal moves of z, relative to the mean change."""
    ways = _ways(generator, start, end, _MOVES + 1).astype(np.float32)
    moves = np.abs(np.diff(ways, axis=1)).mean((2, 3, 4))
    return (moves.max(1) / np.maximum(moves.mean(1), 1e-9)).tolist()


def _strip(first: np.ndarray, ways: np.ndarray, last: np.ndarray, name: str) -> Image.Image:
    frames = ways.reshape(-1, *ways.shape[2:])
    panels = [("image", first), ("G along the line from its z to that of the other", frames), (name, last)]
    return beside(panels, 1, ways.shape[1], 1)
