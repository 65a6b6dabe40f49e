"""What can be chosen: frozen dataclasses, checked on construction, and the named presets.

Beside a field stands its range, and FREE where it may change when a run goes on. The string under it is its `--help`
text. Flags and the keys of config.json are the fields' names.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from .errors import UserError
from .fields import FREE, SEED, Range, check_fields, fits, marked_free, plain_number, require

# multiples of `filters` at the output of each encoder level (paper §3.5 and its figure 1)
STANDARD_WIDTHS: dict[int, tuple[int, ...]] = {
    32: (2, 3, 3),
    64: (2, 3, 4, 4),
    128: (1, 2, 3, 4, 4),
    256: (1, 1, 2, 3, 4, 4),
}


_PAPER_BATCH = 16  # §4.1
LOGGERS = ("tensorboard", "wandb")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of both networks (paper §3.5). Raises UserError for values that no network can have."""

    size: int = 64
    """Image height and width in pixels: 8 * 2^k."""
    filters: Annotated[int, Range(1)] = 128
    """n, the number of channels that every width is a multiple of."""
    hidden: Annotated[int, Range(1)] = 64
    """N_h, the size of the auto-encoder's code."""
    latent: Annotated[int, Range(1)] = 64
    """N_z, the size of the generator's input."""
    widths: tuple[int, ...] | None = None
    """Encoder output width of each level, in multiples of filters; one a level from `size` down to 8."""
    repeats: Annotated[int, Range(1)] = 2
    """Convolutions a level."""
    skips: bool = True
    """Decoder skip connections from its 8x8 tensor (§3.5.1)."""
    vanishing: bool = False
    """Vanishing residuals: layers fade in over the first 16,000 steps (§3.5.1)."""
    init_scale: Annotated[float, Range(0, above=True)] = 1.0
    """Factor of the weights, not biases, that both nets begin with, over torch's default. Not in the paper."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", plain_number(self.size, int))
        levels = (self.size // 8).bit_length() if fits(self.size, int) else 0
        sizes = "8 * 2^k: 8, 16, 32, 64, ..."
        require(levels > 0 and self.size == 8 << (levels - 1), "size", self.size, sizes)
        widths = STANDARD_WIDTHS.get(self.size) if self.widths is None else self.widths
        if widths is None:
            raise UserError(
                f"size {self.size} has no standard widths; give widths, one number for each of {levels} levels"
            )
        if not isinstance(widths, str) and hasattr(widths, "__iter__"):
            widths = tuple(plain_number(width, int) for width in widths)
        whole = fits(widths, tuple[int, ...]) and all(width >= 1 for width in widths)
        require(whole and len(widths) == levels, "widths", widths, f"{levels} whole numbers from 1")
        object.__setattr__(self, "widths", widths)
        check_fields(self)

    def resized(self, size: int | None, filters: int | None) -> ModelConfig:
        """With another image size (and then the standard widths) or n, where one is given."""
        changes: dict[str, Any] = {} if filters is None else {"filters": filters}
        if size is not None and size != self.size:
            changes |= {"size": size, "widths": None}
        return dataclasses.replace(self, **changes)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Encoder output channels of each level, from `size` down to 8."""
        return tuple(width * self.filters for width in self.widths or ())


@dataclass(frozen=True)
class DataConfig:
    """Which images, and how they come (paper §4.1)."""

    data: Annotated[str, FREE] = "faces"
    """faces or portraits (drawn; portraits are harder; NAME:COUNT for another number of them), a folder of images, a
    .tar (webdataset), .zip, .tfrecord or .parquet (Hugging Face) file or a folder of them, a .pack file, cifar10:ROOT
    or fashion-mnist:ROOT."""
    crop: str = "center"
    """What to cut from each image before scaling: center (largest square), none (stretch), pixels (128), or celeba
    (the face in CelebA's aligned images)."""
    max_pixels: Annotated[int, Range(1, 10**10), FREE] = 64_000_000
    """Pixels of the largest file that is decoded."""
    max_bad: Annotated[float, Range(0, 100), FREE] = 1.0
    """Percentage of broken files above which a folder is refused; below, they are named and left out."""
    flip: bool = True
    """Mirror half of the images left-right."""
    jitter: Annotated[int, Range(0)] = 0
    """Scale images to 2 * jitter pixels more than shown and show a random window of them, another one each epoch."""
    loader: Annotated[Literal["auto", "resident", "packed", "dali", "torch"], FREE] = "auto"
    """Where batches come from: the packed set in the GPU's memory, the packed file, or the files themselves, by DALI
    or torch's DataLoader. auto: resident where it fits, else packed."""
    workers: Annotated[int | None, Range(1), FREE] = None
    """Processes or threads that decode files. Default: as many as there are cores to pack, 2 to train."""
    prefetch: Annotated[int, Range(1), FREE] = 2
    """Batches that the loaders dali and torch have ready."""


@dataclass(frozen=True)
class ObjectiveConfig:
    """What both players minimise, and how D and G are kept in balance (paper §3.2-3.4)."""

    gamma: Annotated[float, Range(0, 1)] = 0.5
    """Diversity ratio E[L(G(z))] / E[L(x)] (§3.3)."""
    lambda_k: Annotated[float, Range(0)] = 1e-3
    """Proportional gain of k (§3.4)."""
    eta: Literal[1, 2] = 1
    """Exponent of the pixel-wise loss (§3.1)."""
    passes: Annotated[Literal["auto", "single-pass", "joint", "textbook"], FREE] = "auto"
    """How often D runs: once for each image, once for both batches joined, or three times as the formulas stand. auto:
    the faster of the first two on a CPU, where it is measured; once for each image on a GPU. A run that goes on keeps
    its choice."""
    updates: Literal["simultaneous", "alternating"] = "simultaneous"
    """Update D and G from the same parameters (paper), or D first and G through the updated D."""
    latents: Literal["shared", "independent"] = "shared"
    """Whether z_D and z_G are the same draw."""
    carry_steps: Annotated[int, Range(1)] = 16_000
    """Steps over which a vanishing residual's carry goes from 1 to 0."""


@dataclass(frozen=True)
class OptimizerConfig:
    """How weights move: batch, learning rate and its halving (paper §4.1), average."""

    batch_size: Annotated[int, Range(1)] = 16
    """Images a step, of all ranks together."""
    lr: Annotated[float, Range(0, above=True), FREE] = 1e-4
    """Adam's learning rate at the start."""
    beta1: Annotated[float, Range(0, 0.999)] = 0.9
    """Adam's decay of the mean gradient; the paper only names Adam, whose own this is."""
    lr_floor: Annotated[float, Range(0)] = 2e-5
    """Halving and falling stop here."""
    scaling: Literal["none", "sqrt", "linear"] = "none"
    """How lr, lr_floor and lambda_k, which are meant for 16 images a step, grow with batch_size / 16."""
    lr_window: Annotated[int, Range(0)] = 8000
    """Halve the learning rate when the mean of M over this many steps did not fall; 0 for never."""
    lr_fall: Annotated[float, Range(0, 1), FREE] = 0.0
    """Share of the run, at its end, in which the learning rate falls to lr_floor: 0.5 for the second half. Several
    ranks count images and steps only, no minutes. Not in the paper."""
    ema_half_life: Annotated[float, Range(0)] = 20_000.0
    """Half-life of the averaged generator in images; samples come from it. 0 for no average."""


@dataclass(frozen=True)
class RuntimeConfig:
    """How long, where and how exactly a run computes, and what it writes."""

    images: Annotated[int | None, Range(1), FREE] = None
    """Stop after this many images seen in all, resumed runs included."""
    steps: Annotated[int | None, Range(1), FREE] = None
    """Stop after this many steps in all."""
    minutes: Annotated[float | None, Range(0, above=True), FREE] = None
    """Stop after this many minutes of training in all."""
    seed: Annotated[int, SEED] = 0
    """Everything random follows from it."""
    device: Annotated[str, FREE] = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "tf32", "bf16", "fp16"] = "auto"
    """auto: on a GPU bf16 where it has that natively, on a CPU what a measurement finds fastest; else float32."""
    compile: Annotated[Literal["auto", "off", "default", "max-autotune"], FREE] = "auto"
    """torch.compile for the nets. auto: default, but off where a run is too short to gain from it. A run that goes on
    keeps its choice, unless its length changes."""
    cuda_graph: Annotated[Literal["auto", "off"], FREE] = "auto"
    """auto: on a GPU a whole step is one CUDA graph."""
    cudnn_search: Annotated[Literal["auto", "off"], FREE] = "auto"
    """auto: on a GPU cuDNN times its algorithms for each shape, but not with deterministic."""
    accumulate: Annotated[int, Range(1), FREE] = 1
    """Parts in which a rank takes its images of a step, one after another: less memory, the same step."""
    recompute: Annotated[bool, FREE] = False
    """Compute the encoder's first level again going back instead of keeping it: less memory, more time."""
    deterministic: bool = False
    """Only operations whose results do not vary between runs."""
    log_every: Annotated[int, Range(1), FREE] = 50
    """Steps between rows of metrics.jsonl."""
    sample_every: Annotated[int, Range(1), FREE] = 500
    """Steps between sample sheets."""
    checkpoint_every: Annotated[int, Range(1), FREE] = 1000
    """Steps between checkpoints."""
    keep: Annotated[int, Range(2), FREE] = 2
    """Checkpoints kept, at least 2."""
    log: Annotated[str, FREE] = ""
    """Where rows and sheets go beside metrics.jsonl: tensorboard, wandb, or both with a comma between."""
    rank_timeout: Annotated[float, Range(1), FREE] = 60.0
    """Seconds that one of several ranks may keep the others waiting before the run ends and names it."""
    requeue_code: Annotated[int, Range(0, 255), FREE] = 0
    """Exit code of a run that SIGTERM or SIGUSR1 ended before its end, for schedulers that start such runs again."""


@dataclass(frozen=True)
class TrainConfig(RuntimeConfig, OptimizerConfig, ObjectiveConfig, DataConfig):  # fields come from the last base first
    """How to train (paper §3.2-3.4, §4.1). Raises UserError for values out of range."""

    def __post_init__(self) -> None:
        check_fields(self)
        divisible = self.batch_size % self.accumulate == 0
        require(divisible, "batch_size", self.batch_size, f"multiples of accumulate, {self.accumulate}")
        known = set(self.loggers) <= set(LOGGERS) and len(set(self.loggers)) == len(self.loggers)
        require(known, "log", self.log, " or ".join((*LOGGERS, "both with a comma between")))
        textbook = self.passes == "textbook"
        require(not (self.recompute and textbook), "recompute", True, "False with passes 'textbook', which keeps all")

    def require_runnable(self, world: int, *, launched: bool) -> None:
        """Raises UserError for a run without an end, and for what `world` ranks, `launched` by torchrun, cannot do."""
        if self.images is self.steps is self.minutes is None:
            raise UserError("no length was given; accepted: at least one of images, steps, minutes")
        accepted = "0 under torchrun, which would start the ranks again (examples/slurm.sh queues a job again itself)"
        require(not (self.requeue_code and launched), "requeue_code", self.requeue_code, accepted)
        parts = f"multiples of {world} ranks times accumulate, {self.accumulate}"
        require(self.batch_size % (world * self.accumulate) == 0, "batch_size", self.batch_size, parts)

    @property
    def loggers(self) -> tuple[str, ...]:
        """The names in `log`."""
        return tuple(name.strip() for name in self.log.split(",")) if self.log else ()

    @property
    def scale(self) -> float:
        """Factor of `lr`, `lr_floor` and `lambda_k` for this batch (Goyal et al. 2017; Krizhevsky 2014)."""
        more = self.batch_size / _PAPER_BATCH
        return {"none": 1.0, "sqrt": more**0.5, "linear": more}[self.scaling]


FREE_ON_RESUME = marked_free(TrainConfig)
"""Settings that may change when a run goes on: they say how long, where and how often, not what is learned."""


@dataclass(frozen=True)
class Preset:
    """A named starting point."""

    model: ModelConfig
    train: TrainConfig


def _paper(size: int, gamma: float) -> Preset:
    # paper §4.1: batch 16, lr 1e-4 and halved on a stall, 400-450 thousand steps
    return Preset(ModelConfig(size=size), TrainConfig(gamma=gamma, images=7_000_000, ema_half_life=100_000))


def _drawn(**settings: Any) -> TrainConfig:
    # short runs on drawn faces, which have no texture that D must leave out: gamma is 1
    return TrainConfig(gamma=1.0, lr_fall=1.0, lr_window=0, beta1=0.5, **settings)


PRESETS: dict[str, Preset] = {
    "demo": Preset(  # minutes on two cores of a CPU
        ModelConfig(size=32, filters=24, repeats=1, init_scale=0.6),
        _drawn(lr=6e-4, lambda_k=5e-2, images=88_000, ema_half_life=1000, sample_every=200, checkpoint_every=1000),
    ),
    "demo-64": Preset(  # hours there
        ModelConfig(size=64, filters=32, repeats=1),
        _drawn(
            lr=1e-4, lambda_k=2e-2, images=1_000_000, ema_half_life=10_000, sample_every=2000, checkpoint_every=2000
        ),
    ),
    "paper-32": _paper(32, 0.5),
    "paper-64": _paper(64, 0.5),
    "paper-128": _paper(128, 0.7),
    "paper-256": _paper(256, 0.7),
}
