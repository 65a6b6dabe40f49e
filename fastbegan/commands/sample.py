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
_MOST = 100_000  # images in one picture, which memory holds as a whole: 1.2 GB at 64 px
_COLUMNS = 8

DEMO = Path(__file__).parents[1] / "demo"
"""A run folder with only a small trained generator, for use before any training."""


@dataclass(frozen=True)
class Sample:
    """Draw images with a trained generator (the average of its weights over training)."""

    run_folder: Positional[Path | None] = None
    """The folder that `fastbegan train` made. Default: a small generator that comes with fastbegan."""
    out: Path | None = None
    """Folder for the pictures. Default: generated/, in the run folder if one is given."""
    count: int = 64
    """Number of images; with --interpolate, number of rows of the strip."""
    seed: int = 0
    """Chooses the latents."""
    columns: int | None = None
    """Images in a row of the sheet. Default: 8."""
    single: bool = False
    """Also write each image as a PNG of its own, into seed-SEED/ beside the sheet."""
    interpolate: int = 0
    """Steps from each image to the next; writes a strip instead of a sheet."""
    gif: bool = False
    """With --interpolate: also write an animation."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def run(self) -> int:
        return sample(self)


def sample(options: Sample) -> int:
    """Draw a sheet of images, or with `interpolate` a strip between them; prints its files, returns the exit code.

    Without a run folder, the generator that comes with the package draws. Image i of a seed is the same for any
    `count`. Raises UserError for bad options.
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
    device, _ = pick_device(options.device)
    generator = run.load_generator(device)
    folder = make_folder(options.out or (Path() if options.run_folder is None else run.path) / "generated")
    if options.run_folder is None:
        print("no run was given: this is the small generator that comes with fastbegan")
    rows = options.count + 1 if options.interpolate else options.count  # each row leads to the next latent
    z = sheet_latents(run.read_config().model.latent, options.seed, rows, device)
    written = []
    if options.interpolate:
        frames = generate(generator, interpolate_latents(z, options.interpolate).flatten(0, 1))
        save_png(path := folder / f"interpolation-{options.seed}.png", grid(frames, options.interpolate))
        written.append(path)
        if options.gif:
            path = path.with_suffix(".gif")
            save_gif(path, [grid(frame[None], 1) for frame in frames], _FRAME_MILLISECONDS)
            written.append(path)
    else:
        images = generate(generator, z)
        save_png(path := folder / f"sheet-{options.seed}.png", grid(images, options.columns or _COLUMNS))
        written.append(path)
        if options.single:
            # in a folder of their own, which `evaluate` and `train` take as images
            singles = make_folder(folder / f"seed-{options.seed}")
            for number, image in enumerate(images):
                save_png(singles / f"{number:05d}.png", image)
            written.append(singles / f"*.png ({len(images)} files)")
    for path in written:
        print(path)
    return 0
