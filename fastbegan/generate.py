"""`fastbegan sample`: pictures from a trained generator."""

from __future__ import annotations

from pathlib import Path

from .device import pick_device
from .errors import UserError
from .files import make_folder
from .run import RunFolder
from .samples import generate, grid, interpolate_latents, save_gif, save_png, sheet_latents

_FRAME_MILLISECONDS = 60


DEMO = Path(__file__).parent / "demo"
"""A run folder with nothing but a small trained generator, so that there is one before any training."""


def sample(
    run_folder: Path | None = None,
    *,
    out: Path | None = None,
    count: int = 64,
    seed: int = 0,
    columns: int = 8,
    single: bool = False,
    interpolate: int = 0,
    gif: bool = False,
    device: str = "auto",
) -> int:
    """Write a sheet of `count` images, or with `interpolate` a strip of ways between them; prints what it wrote.

    Without a run the generator that comes with the package draws, into generated/. Image i of a seed is the same for
    any `count`. Raises UserError for bad input.
    """
    for name, value, least in (("count", count, 1), ("columns", columns, 1), ("seed", seed, 0)):
        if value < least:
            raise UserError(f"{name} is {value}; accepted: whole numbers from {least}")
    if interpolate and interpolate < 2:
        raise UserError(f"interpolate is {interpolate}; accepted: 0 for a sheet, or steps from 2")
    if gif and not interpolate:
        raise UserError("gif needs interpolate, for instance --interpolate 12 --gif")
    run = RunFolder(DEMO if run_folder is None else run_folder)
    generator = run.load_generator(place := pick_device(device)[0])
    folder = make_folder(out or (Path() if run_folder is None else run.path) / "generated")
    if run_folder is None:
        print("no run was given: this is the small generator that comes with fastbegan")
    rows = count + 1 if interpolate else count  # `count` ways have one more end than ways
    z = sheet_latents(run.read_config().model.latent, seed, rows, place)
    written = []
    if interpolate:
        frames = generate(generator, interpolate_latents(z, interpolate).flatten(0, 1))
        save_png(path := folder / f"interpolation-{seed}.png", grid(frames, interpolate))
        written.append(path)
        if gif:
            save_gif(
                path := folder / f"interpolation-{seed}.gif",
                [grid(f[None], 1) for f in frames],
                _FRAME_MILLISECONDS,
            )
            written.append(path)
    else:
        images = generate(generator, z)
        save_png(path := folder / f"sheet-{seed}.png", grid(images, columns))
        written.append(path)
        if single:
            for number, image in enumerate(images):
                save_png(folder / f"{seed}-{number:05d}.png", image)
            written.append(folder / f"{seed}-*.png ({len(images)} files)")
    for path in written:
        print(path)
    return 0
