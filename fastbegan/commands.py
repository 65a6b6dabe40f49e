"""What each command takes; `run` does it. The string under a field is its `--help` text."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional

from .config import PRESETS, ModelConfig, Preset, TrainConfig
from .errors import UserError
from .runs.folder import RunConfig


@dataclass(frozen=True)
class Train:
    """Train a BEGAN. Without options: the demo, on procedural portraits, into a new folder under runs/."""

    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "demo"
    """Where all other options start from: demo, paper-32, paper-64, paper-128, paper-256."""
    out: Path | None = None
    """The run folder. A folder that holds a run is continued, with that run's settings. Default: a new one in runs/."""
    resume: Literal["auto", "off"] = "auto"
    """off: refuse a folder that holds a run."""

    def run(self) -> int:
        from .training.loop import train

        return train(RunConfig(self.preset, self.model, self.train), self.out, resume=self.resume == "auto")


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
        from .generate import sample

        return sample(**vars(self))


@dataclass(frozen=True)
class Evaluate:
    """Compare images, a generator's or files, with a data set: Frechet and kernel distance, inception score, precision,
    recall, diversity."""

    images: Positional[str]
    """A run folder, whose averaged generator draws them, or images as train takes them for data."""
    against: str | None = None
    """The data set, as train takes it. Default: what the run was trained on."""
    count: int = 5000
    """How many images of each side, or all there are. Below 10,000 the Frechet distance comes out clearly too high."""
    size: int | None = None
    """Height and width to which both sides are scaled. Default: the run's, else 64."""
    crop: str | None = None
    """As for train. Default: the run's, else center."""
    extractor: Literal["efficientnet-lite0", "inception"] = "efficientnet-lite0"
    """Whose features are compared. inception needs its weights, by --inception, and gives the usual FID."""
    inception: Path | None = None
    """File of torch-fidelity's weights of Inception, weights-inception-2015-12-05-6726825d.pth; its hash is checked."""
    seed: int = 0
    """Which latents, and which images of a set that has more than --count."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print only JSON."""

    def run(self) -> int:
        from .evaluation.scores import evaluate_command

        return evaluate_command(**vars(self))


@dataclass(frozen=True)
class Explore:
    """Make one HTML page of a run, to look into it in a browser: interpolations, sheets, curves, nearest images."""

    run_folder: Positional[Path]
    """The folder that `fastbegan train` made."""
    out: Path | None = None
    """The file to write, NAME.html. Default: explore.html in the run folder."""
    data: str | None = None
    """Where the images are that the run was trained on, where they have moved; as --data of train."""
    seed: int = 0
    """Which latents, as for sample."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""

    def run(self) -> int:
        from .explore import explore

        return explore(**vars(self))


@dataclass(frozen=True)
class Experiment:
    """Repeat an experiment of the paper (its section 4): trains what it needs, writes a report."""

    name: Positional[Literal["diversity", "continuity", "convergence", "unbalanced", "scores", "ablation"]]
    """diversity (gamma), continuity (latents of real images), convergence (M against quality), unbalanced (a starved D
    or G), scores (of generated images), ablation (skips, vanishing residuals, updates, latents)."""
    scale: Literal["demo", "paper", "smoke"] = "demo"
    """demo: minutes on two cores; paper: the paper's nets and lengths, for GPUs; smoke: only that it works."""
    out: Path | None = None
    """The folder. One that holds this experiment is continued. Default: experiments/NAME-SCALE."""
    data: str | None = None
    """As --data of train. Default: portraits; paper scale needs one."""
    trained: Path | None = None
    """A run to look at instead of training one (continuity, convergence, scores)."""
    seed: int = 0
    """Everything random follows from it."""
    seeds: int | None = None
    """How many seeds, from `seed` on, diversity takes. Default: the scale's."""
    extractor: Literal["efficientnet-lite0", "inception"] = "efficientnet-lite0"
    """As for evaluate."""
    inception: Path | None = None
    """As for evaluate."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    any_code: bool = False
    """Go on with what another version of the code, or another kind of device, has made; the report then says so."""

    def run(self) -> int:
        from .experiments import experiment

        return experiment(**vars(self))


@dataclass(frozen=True)
class Export:
    """Write a run's nets, the averaged generator and the auto-encoder D, for use without fastbegan."""

    run_folder: Positional[Path]
    """The folder that `fastbegan train` made."""
    format: Literal["onnx", "pt2", "plain"]
    """onnx; pt2: PyTorch's own, for torch.export.load; plain: model.py and safetensors, which need torch only."""
    out: Path | None = None
    """Where the files go. Default: export/ in the run folder."""
    net: Literal["generator", "autoencoder", "both"] = "both"
    """Which of the nets."""
    check: Literal["on", "off"] = "on"
    """on: read what was written, run it, and refuse it where it differs from PyTorch's modules."""

    def run(self) -> int:
        from .export import export

        return export(self.run_folder, self.format, out=self.out, net=self.net, check=self.check == "on")


@dataclass(frozen=True)
class Info:
    """What a run is and how far it came; without a folder, the presets."""

    run_folder: Positional[Path | None] = None
    """The folder that `fastbegan train` made."""
    markdown: bool = False
    """Print the table of presets as Markdown."""

    def run(self) -> int:
        from .info import show_presets, show_run

        return show_presets(markdown=self.markdown) if self.run_folder is None else show_run(self.run_folder)


@dataclass(frozen=True)
class Doctor:
    """What this machine runs for every op, and why; on a GPU every kernel is checked and timed."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: str = "auto"
    """auto, float32, tf32, bf16 or fp16; with --tune several with commas between."""
    filters: int | None = None
    """Channels of the layers that are tried (default: 64), or n of the preset."""
    size: int | None = None
    """Height and width of their inputs (default: 32), or the preset's image size."""
    batch_size: int | None = None
    """Images at once. Default: 16, or the preset's. With --tune those of one GPU, not of all ranks."""
    preset: str | None = None
    """Instead of layers: what a step of this preset needs here, and the largest batch that fits."""
    tune: bool = False
    """With --preset on a GPU: choose all its kernels now, into the cache that runs read; before a job of many nodes."""
    cudnn_search: Literal["auto", "off"] = "auto"
    """As for train: what is chosen under one setting is not used under the other."""

    def run(self) -> int:
        from .doctor import doctor, doctor_preset, doctor_tune

        common: dict[str, Any] = {"device": self.device, "cudnn_search": self.cudnn_search == "auto"}
        if self.preset is None:
            if self.tune:
                raise UserError("tune is True without a preset; accepted: --preset NAME --tune")
            sizes = {"filters": 64, "size": 32, "batch_size": 16}
            for name, default in sizes.items():
                common[name] = default if getattr(self, name) is None else getattr(self, name)
            return doctor(precision=self.precision, **common)
        preset = find_preset(self.preset)
        model = preset.model.resized(self.size, self.filters)
        batch_size = preset.train.batch_size if self.batch_size is None else self.batch_size
        train = dataclasses.replace(preset.train, batch_size=batch_size)
        if self.tune:
            return doctor_tune(model, train, precisions=self.precision.split(","), **common)
        return doctor_preset(model, train, precision=self.precision, **common)


@dataclass(frozen=True)
class DataPack:
    """Decode images once into one file that training maps into memory. A pack that was cut off is taken up again."""

    source: Positional[str]
    """As --data of train: a folder, a .tar or .tfrecord file, faces:COUNT, cifar10:ROOT, fashion-mnist:ROOT."""
    out: Positional[Path]
    """The file to write, NAME.pack; NAME.rejected.txt beside it names what was broken, left out or converted."""
    size: int = 64
    """Height and width of the packed images; with --jitter J of train, 2 * J more than the nets' size."""
    crop: str = "center"
    """center (largest square), none (stretch), pixels (128), or celeba (the face in CelebA's aligned images)."""
    max_bad: float = 1.0
    """Percentage of broken files above which nothing is packed."""
    workers: int | None = None
    """Processes that decode. Default: as many as there are cores."""

    def run(self) -> int:
        from .data.tools import pack

        return pack(self.source, self.out, size=self.size, crop=self.crop, max_bad=self.max_bad, workers=self.workers)


@dataclass(frozen=True)
class DataCheck:
    """Decode every image of a source and name the broken ones; exit code 1 if there are any."""

    source: Positional[str]
    """A folder, a .tar or .tfrecord file."""
    crop: str = "center"
    """As for pack."""
    workers: int | None = None
    """Processes that decode. Default: as many as there are cores."""

    def run(self) -> int:
        from .data.tools import check

        return check(self.source, crop=self.crop, workers=self.workers)


@dataclass(frozen=True)
class DataInfo:
    """What a pack holds, and a contact sheet of it."""

    pack: Positional[Path]
    """The file."""
    sheet: Path | None = None
    """Where the sheet goes. Default: NAME.sheet.png beside NAME.pack."""

    def run(self) -> int:
        from .data.tools import info

        return info(self.pack, sheet=self.sheet)


@dataclass(frozen=True)
class BenchStep:
    """Time every way to do a training step on this machine, turn by turn in one run."""

    preset: str = "demo"
    """Nets, batch and loss: demo, paper-32, paper-64, paper-128, paper-256."""
    size: int | None = None
    """Image size. Default: the preset's."""
    filters: int | None = None
    """n. Default: the preset's."""
    batch_size: int | None = None
    """Images a step. Default: the preset's."""
    modes: str = "all"
    """Of textbook, single-pass, joint, alternating, each also with +compile: some, with commas between. all: those,
    and textbook+compile and single-pass+compile."""
    precision: str = "auto"
    """auto, float32, tf32, bf16, fp16; several with commas between."""
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    """How modes with +compile are compiled; off leaves them out."""
    rounds: int = 10
    """Turns, of which the median counts."""
    cudnn_search: Literal["auto", "off"] = "auto"
    """As for train."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    json: bool = False
    """Print only JSON."""

    def run(self) -> int:
        from .measure.step import DEFAULT_MODES, bench_step

        preset = find_preset(self.preset)
        batch_size = preset.train.batch_size if self.batch_size is None else self.batch_size
        return bench_step(
            preset.model.resized(self.size, self.filters),
            dataclasses.replace(
                preset.train, batch_size=batch_size, device=self.device, cudnn_search=self.cudnn_search
            ),
            modes=DEFAULT_MODES if self.modes == "all" else self.modes.split(","),
            precisions=self.precision.split(","),
            compile_mode=self.compile,
            rounds=self.rounds,
            as_json=self.json,
        )


@dataclass(frozen=True)
class BenchReport:
    """Make tables and plots of what `pytest bench/ --results FILE.json` measured."""

    results: Positional[tuple[Path, ...]] = (Path("bench/results"),)
    """JSON files, or folders of them; of each device the newest is shown, and the others as its history."""
    out: Path | None = None
    """A folder for report.md and its pictures. Default: print the tables only."""
    readme: bool = False
    """Print the README's section on speed."""

    def run(self) -> int:
        from .measure.report import bench_report

        return bench_report(self.results, out=self.out, as_readme=self.readme)


@dataclass(frozen=True)
class BenchPlan:
    """Estimate what training a preset takes on other GPUs: images a second, hours, energy. A model, and labelled so."""

    preset: str = "paper-128"
    """Nets and number of images."""
    gpu: str = "all"
    """p100, v100, a100, h100, b200, or all."""
    gpus: str = "1"
    """How many; several numbers with commas between, to see how far it scales: 1,8,64,512."""
    batch_size: int | None = None
    """Images a card and step. Default: the preset's."""
    share: float | None = None
    """Share of the card's peak that a step reaches. Default: as measured on such a card, else an assumed one."""
    link: Literal["nvlink", "pcie"] = "nvlink"
    """What joins the cards of a node."""
    network: float = 100.0
    """Gb/s of a node's link to the others."""
    results: Path = Path("bench/results")
    """Where measured shares are looked for."""
    json: bool = False
    """Print only JSON."""

    def run(self) -> int:
        from .measure.plan import bench_plan

        preset = find_preset(self.preset)
        batch_size = preset.train.batch_size if self.batch_size is None else self.batch_size
        return bench_plan(
            self.preset,
            preset.model,
            dataclasses.replace(preset.train, batch_size=batch_size),
            gpu=self.gpu,
            gpus=_counts(self.gpus),
            share=self.share,
            link=self.link,
            network=self.network,
            folder=self.results,
            as_json=self.json,
        )


def _counts(text: str) -> list[int]:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise UserError(f"gpus is {text!r}; accepted: whole numbers from 1, with commas between")
    return [int(part) for part in text.split(",")]


def find_preset(name: str) -> Preset:
    if name not in PRESETS:
        raise UserError(f"preset is {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]
