"""`fastbegan sample`: pictures from a trained generator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tyro.conf import Positional

from ..device import pick_device
from ..errors import UserError
from ..fields import require_seed
from ..files import make_folder
from ..runs.folder import RunFolder
from ..runs.sheets import generate, grid, interpolate_latents, save_gif, save_png, sheet_latents

_FRAME_MILLISECONDS = 60
_MOST = 100_000  # images in one picture, which is in memory as a whole: 1.2 GB for up to 64 px
_COLUMNS = 8


DEMO = Path(__file__).parents[1] / "demo"
"""A run folder with nothing but a small trained generator, so that there is one before any training."""


@dataclass(frozen=True)
class Sample:
    """Draw images with a trained generator (its average over training)."""

    run_folder: Positional[Path | None] = None
    """The folder that `fastbegan train` made. Default: a small generator that comes with fastbegan."""
    out: Path | None = None
    """Where the pictures go. Default: generated/, in the run folder if one was given."""
    count: int = 64
    """How many images; with --interpolate, how many rows of the strip."""
    seed: int = 0
    """Which latents."""
    columns: int | None = None
    """Images in a row of the sheet. Default: 8."""
    single: bool = False
    """Write each image as a PNG of its own too, into seed-SEED/ beside the sheet."""
    interpolate: int = 0
    """Steps on the way from each image to the next: writes a strip instead of a sheet."""
    gif: bool = False
    """With --interpolate, write the way as an animation too."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def run(self) -> int:
        return sample(self)


def sample(options: Sample) -> int:
    """Write a sheet of `count` images, or with `interpolate` a strip of ways between them; prints what it wrote.

    Without a run the generator that comes with the package draws, into generated/. Image i of a seed is the same for
    any `count`; with `single` it is also seed-SEED/i.png there, in a folder of such images only. Raises UserError for
    bad input.
    """
    require_seed(options.seed)
    if not 1 <= options.count <= _MOST:
        raise UserError(f"count is {options.count}; accepted: whole numbers from 1 to {_MOST}")
    if options.columns is not None and options.columns < 1:
        raise UserError(f"columns is {options.columns}; accepted: whole numbers from 1")
    if options.interpolate and options.interpolate < 2:
        raise UserError(f"interpolate is {options.interpolate}; accepted: 0 for a sheet, or steps from 2")
    if options.count * options.interpolate > _MOST:
        accepted = f"with count {options.count}: steps up to {_MOST // options.count}"
        raise UserError(f"interpolate is {options.interpolate}; accepted {accepted}")
    if options.gif and not options.interpolate:
        raise UserError("gif needs interpolate, for instance --interpolate 12 --gif")
    for name, value in (("single", options.single or None), ("columns", options.columns)):
        if options.interpolate and value is not None:
            raise UserError(
                f"{name} is {value}; accepted with a sheet only, not with interpolate {options.interpolate}"
            )
    run = RunFolder(DEMO if options.run_folder is None else options.run_folder)
    generator = run.load_generator(place := pick_device(options.device)[0])
    folder = make_folder(options.out or (Path() if options.run_folder is None else run.path) / "generated")
    if options.run_folder is None:
        print("no run was given: this is the small generator that comes with fastbegan")
    rows = options.count + 1 if options.interpolate else options.count  # `count` ways have one more end than ways
    z = sheet_latents(run.read_config().model.latent, options.seed, rows, place)
    written = []
    if options.interpolate:
        frames = generate(generator, interpolate_latents(z, options.interpolate).flatten(0, 1))
        save_png(path := folder / f"interpolation-{options.seed}.png", grid(frames, options.interpolate))
        written.append(path)
        if options.gif:
            save_gif(
                path := folder / f"interpolation-{options.seed}.gif",
                [grid(f[None], 1) for f in frames],
                _FRAME_MILLISECONDS,
            )
            written.append(path)
    else:
        images = generate(generator, z)
        save_png(path := folder / f"sheet-{options.seed}.png", grid(images, options.columns or _COLUMNS))
        written.append(path)
        if options.single:
            # by themselves: a folder that `evaluate` and `train` take as images
            singles = make_folder(folder / f"seed-{options.seed}")
            for number, image in enumerate(images):
                save_png(singles / f"{number:05d}.png", image)
            written.append(singles / f"*.png ({len(images)} files)")
    for path in written:
        print(path)
    return 0
