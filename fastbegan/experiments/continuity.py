"""Is the generator continuous, and does it cover real images (paper §4.3)? Latents of real images, and ways between."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..models import Generator
from ..samples import generate, grid, save_gif, sheet_latents
from .study import Study

_RANDOM, _PAIRS, _FRAMES, _TILES, _MOVES = 256, 6, 10, 10, 31
_AT_ONCE = 32  # images, for memory
_RATE, _LAST_RATE = 0.1, 0.005  # Adam's, falling geometrically


def recover(generator: Generator, images: Tensor, start: Tensor, steps: int) -> Tensor:
    """Latents [N, latent] in [-1, 1] whose images come close to `images` [N, 3, H, W], by Adam on |x - G(z)|.

    Images are in [-1, 1]. Each z is put back into [-1, 1] after every step; of all that it was the nearest one counts.
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
    """Recover latents of real images and of their mirror images; compare with random ones; draw the ways between."""
    trained = study.train_one("run")
    generator = study.generator(trained).requires_grad_(False)
    pixels = study.some_real(trained, study.scale.recovered)
    if len(pixels) < 2:
        raise UserError(
            f"{trained.folder.path} was trained on {len(pixels)} image; accepted: from 2, to go between them"
        )
    real = torch.from_numpy(pixels).permute(0, 3, 1, 2).to(study.device).float().div(127.5).sub(1)
    both = torch.cat((real, real.flip(3)))
    latent, count = generator.config.latent, len(real)
    pairs = min(_PAIRS, count // 2)
    # other draws than those that it is compared with
    start = sheet_latents(latent, study.settings.seed + 1, len(both), study.device)

    def figures() -> dict[str, Any]:
        parts = zip(both.split(_AT_ONCE), start.split(_AT_ONCE), strict=True)
        z = torch.cat([recover(generator, images, first, study.scale.descent) for images, first in parts])
        candidates = sheet_latents(latent, study.settings.seed, _RANDOM, study.device)
        with torch.no_grad():
            drawn, others = (
                torch.cat([generator(some) for some in all_of.split(_AT_ONCE)]) for all_of in (z, candidates)
            )
            errors, others = _errors(drawn, both), others.flatten(1)
            distances = torch.cdist(both.flatten(1), others, p=1) / others.shape[1]
        ways = _ways(generator, z[: 2 * pairs : 2], z[1 : 2 * pairs : 2], _MOVES + 1).astype(np.float32)
        moves = np.abs(np.diff(ways, axis=1)).mean((2, 3, 4))
        return {
            "z": z.cpu().double().numpy().round(6).tolist(), "error": errors.tolist(),
            "mean_image": _errors(real.mean(0, keepdim=True), both).tolist(),
            "random_best": distances.min(1).values.tolist(), "random_mean": distances.mean(1).tolist(),
            "largest_move": (moves.max(1) / np.maximum(moves.mean(1), 1e-9)).tolist(),
        }  # fmt: skip

    found = study.measure("latents", figures)
    z = torch.tensor(found["z"], dtype=torch.float32, device=study.device)
    error, best = np.array(found["error"][:count]), np.array(found["random_best"][:count])
    mean = np.array(found["mean_image"][:count])
    share, factor = float((error < best).mean()), float(np.median(best / error))
    of_mean = float((error < mean).mean())

    drawn = generate(generator, z)
    rows = np.concatenate((pixels[:_TILES], drawn[:_TILES], pixels[:_TILES, :, ::-1], drawn[count : count + _TILES]))
    study.say(
        f"z of {count} training images, and of their mirror images, by {study.scale.descent:,} steps of Adam on "
        "|x - G(z)| from a random start, put back into [-1, 1] after each. First row: images; second: G(z) of the z "
        "that was found; third and fourth: the same for the mirrored images."
    )
    study.picture("recovered", grid(rows, min(count, _TILES)), "Images and what G makes of the z found for them.")
    between = _ways(generator, z[: 2 * pairs : 2], z[1 : 2 * pairs : 2], _FRAMES)
    study.picture(
        "between",
        _strip(pixels[: 2 * pairs : 2], between, pixels[1 : 2 * pairs : 2]),
        "Ways between two images: an image, G along the line from its z to the other's, that one.",
    )
    mirrored = _ways(generator, z[:pairs], z[count : count + pairs], _FRAMES)
    study.picture(
        "mirror",
        _strip(pixels[:pairs], mirrored, pixels[:pairs, :, ::-1]),
        "Ways between an image and its mirror image.",
    )
    frames = np.concatenate((between, mirrored))
    there_and_back = [*range(_FRAMES), *range(_FRAMES - 2, 0, -1)]
    save_gif(study.folder / "ways.gif", [grid(frames[:, number], pairs) for number in there_and_back], 90)
    study.show("ways.gif", "The same as an animation; above between images, below between mirror images.")
    largest = float(np.max(found["largest_move"]))
    numbers = {
        "error": float(error.mean()),
        "mirrored_error": float(np.mean(found["error"][count:])),
        "random_best": float(best.mean()),
        "random_mean": float(np.mean(found["random_mean"][:count])),
        "mean_image": float(mean.mean()),
        "factor": factor,
        "share": share,
        "largest_move": largest,
    }
    titles = {
        "error": "z found",
        "mirrored_error": "z found, mirrored images",
        "random_best": f"best of {_RANDOM} random z",
        "mean_image": "the mean of the images",
        "random_mean": "random z",
    }
    study.table(("mean |x - G(z)|, images in [-1, 1]", ""), [(title, numbers[name]) for name, title in titles.items()])
    study.say(
        f"The z found are {factor:.2f} times as near as the best of {_RANDOM} random ones (median over images). On the "
        f"ways between images, of {_MOVES} equal moves of z the one that changes the picture most changes it "
        f"{largest:.1f} times as much as the mean one (a jump would be {_MOVES} times)."
    )
    study.check(
        f"z found is nearer than the best of {_RANDOM} random ones for at least 90 % of the images",
        f"for {share:.0%}, {factor:.2f} times as near (median)",
        share >= 0.9,
    )
    study.check(
        "z found is nearer than the mean of the images, for at least 90 %", f"for {of_mean:.0%}", of_mean >= 0.9
    )
    study.check("all z stay in [-1, 1]", f"largest |z| {z.abs().max().item():g}", z.abs().max().item() <= 1)
    study.finish(
        "Continuity: latents of real images, and the ways between them",
        "The paper's §4.3: where real images have latents near which G draws them, and the lines between those latents "
        "give images all along, G has not just learned some images by heart.",
        numbers,
    )


def _errors(drawn: Tensor, images: Tensor) -> Tensor:
    """Mean |x - G(z)| of each image: [N]."""
    return (images - drawn).abs().flatten(1).mean(1)


def _ways(generator: Generator, start: Tensor, end: Tensor, frames: int) -> np.ndarray:
    """G along the lines between rows of latents: uint8 [N, frames, H, W, 3]."""
    weights = torch.linspace(0, 1, frames, device=start.device)[None, :, None]
    images = generate(generator, torch.lerp(start[:, None], end[:, None], weights).flatten(0, 1))
    return images.reshape(len(start), frames, *images.shape[1:])


def _strip(first: np.ndarray, ways: np.ndarray, last: np.ndarray) -> np.ndarray:
    rows = np.concatenate((first[:, None], ways, last[:, None]), axis=1)
    return grid(rows.reshape(-1, *rows.shape[2:]), rows.shape[1])
