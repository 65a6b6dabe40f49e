"""`fastbegan sample`: pictures from a trained generator."""

from __future__ import annotations

from pathlib import Path

from .config import require_seed
from .device import pick_device
from .errors import UserError
from .files import make_folder
from .runs.folder import RunFolder
from .runs.sheets import generate, grid, interpolate_latents, save_gif, save_png, sheet_latents

_FRAME_MILLISECONDS = 60
_MOST = 100_000  # images in one picture, which is in memory as a whole: 1.2 GB for up to 64 px
_COLUMNS = 8


DEMO = Path(__file__).parent / "demo"
"""A run folder with nothing but a small trained generator, so that there is one before any training."""


def sample(
    run_folder: Path | None = None,
    *,
    out: Path | None = None,
    count: int = 64,
    seed: int = 0,
    columns: int | None = None,
    single: bool = False,
    interpolate: int = 0,
    gif: bool = False,
    device: str = "auto",
) -> int:
    """Write a sheet of `count` images, or with `interpolate` a strip of ways between them; prints what it wrote.

    Without a run the generator that comes with the package draws, into generated/. Image i of a seed is the same for
    any `count`; with `single` it is also seed-SEED/i.png there, in a folder of such images only. Raises UserError for
    bad input.
    """
    require_seed(seed)
    if not 1 <= count <= _MOST:
        raise UserError(f"count is {count}; accepted: whole numbers from 1 to {_MOST}")
    if columns is not None and columns < 1:
        raise UserError(f"columns is {columns}; accepted: whole numbers from 1")
    if interpolate and interpolate < 2:
        raise UserError(f"interpolate is {interpolate}; accepted: 0 for a sheet, or steps from 2")
    if count * interpolate > _MOST:
        raise UserError(f"interpolate is {interpolate}; accepted with count {count}: steps up to {_MOST // count}")
    if gif and not interpolate:
        raise UserError("gif needs interpolate, for instance --interpolate 12 --gif")
    for name, value in (("single", single or None), ("columns", columns)):
        if interpolate and value is not None:
            raise UserError(f"{name} is {value}; accepted with a sheet only, not with interpolate {interpolate}")
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
        save_png(path := folder / f"sheet-{seed}.png", grid(images, columns or _COLUMNS))
        written.append(path)
        if single:
            # by themselves: a folder that `evaluate` and `train` take as images
            singles = make_folder(folder / f"seed-{seed}")
            for number, image in enumerate(images):
                save_png(singles / f"{number:05d}.png", image)
            written.append(singles / f"*.png ({len(images)} files)")
    for path in written:
        print(path)
    return 0
