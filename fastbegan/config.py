"""What can be chosen: frozen dataclasses, checked on construction, and the named presets.

The string under a field is its `--help` text.
"""

from __future__ import annotations

import dataclasses
import typing
from dataclasses import dataclass
from typing import Any, Literal

from .errors import UserError

# multiples of `filters` at the output of each encoder level (paper §3.5 and its figure 1)
STANDARD_WIDTHS: dict[int, tuple[int, ...]] = {
    32: (2, 3, 3),
    64: (2, 3, 4, 4),
    128: (1, 2, 3, 4, 4),
    256: (1, 1, 2, 3, 4, 4),
}


_PAPER_BATCH = 16  # §4.1


def _require(ok: bool, field: str, value: object, accepted: str) -> None:
    if not ok:
        raise UserError(f"{field} is {value!r}; accepted: {accepted}")


def require_seed(seed: int) -> None:
    """Raises UserError for a seed that torch does not take."""
    _require(0 <= seed < 2**63, "seed", seed, "whole numbers from 0 to 2^63 - 1")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of both networks (paper §3.5). Raises UserError for values that no network can have."""

    size: int = 64
    """Image height and width in pixels: 8 * 2^k."""
    filters: int = 128
    """n, the number of channels that every width is a multiple of."""
    hidden: int = 64
    """N_h, the size of the auto-encoder's code."""
    latent: int = 64
    """N_z, the size of the generator's input."""
    widths: tuple[int, ...] | None = None
    """Encoder output width of each level, in multiples of filters; one a level from `size` down to 8."""
    repeats: int = 2
    """Convolutions a level."""
    skips: bool = True
    """Decoder skip connections from its 8x8 tensor (§3.5.1)."""
    vanishing: bool = False
    """Vanishing residuals: layers fade in over the first 16,000 steps (§3.5.1)."""

    def __post_init__(self) -> None:
        levels = (self.size // 8).bit_length()
        _require(
            self.size >= 8 and self.size == 8 << (levels - 1),
            "size",
            self.size,
            "8 * 2^k: 8, 16, 32, 64, ...",
        )
        for field in ("filters", "hidden", "latent", "repeats"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "whole numbers from 1")
        widths = STANDARD_WIDTHS.get(self.size) if self.widths is None else tuple(self.widths)
        if widths is None:
            raise UserError(
                f"size {self.size} has no standard widths; give widths, one number for each of {levels} levels"
            )
        _require(
            len(widths) == levels and all(w >= 1 for w in widths),
            "widths",
            widths,
            f"{levels} whole numbers from 1",
        )
        object.__setattr__(self, "widths", widths)

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Encoder output channels of each level, from `size` down to 8."""
        return tuple(width * self.filters for width in self.widths or ())


@dataclass(frozen=True)
class TrainConfig:
    """How to train (paper §3.2-3.4, §4.1). Raises UserError for values out of range."""

    data: str = "faces"
    """faces (procedural portraits; faces:COUNT for another number of them), a folder of images, a .tar (webdataset) or
    .tfrecord file or a folder of them, a .pack file, cifar10:ROOT or fashion-mnist:ROOT."""
    crop: str = "center"
    """What to cut from each image before scaling: center (largest square), none (stretch), pixels (128), or celeba
    (the face in CelebA's aligned images)."""
    max_bad: float = 1.0
    """Percentage of broken files above which a folder is refused; below, they are named and left out."""
    flip: bool = True
    """Mirror half of the images left-right."""
    jitter: int = 0
    """Scale images to 2 * jitter pixels more than shown and show a random window of them, another one each epoch."""
    loader: Literal["auto", "resident", "packed", "dali", "torch"] = "auto"
    """Where batches come from: the packed set in the GPU's memory, the packed file, or the files themselves, by DALI
    or torch's DataLoader. auto: resident where it fits, else packed."""
    workers: int | None = None
    """Processes or threads that decode files. Default: as many as there are cores to pack, 2 to train."""
    prefetch: int = 2
    """Batches that the loaders dali and torch have ready."""
    images: int | None = None
    """Stop after this many images seen in all, resumed runs included."""
    steps: int | None = None
    """Stop after this many steps in all."""
    minutes: float | None = None
    """Stop after this many minutes of training in all."""
    batch_size: int = 16
    """Images a step, of all ranks together."""
    accumulate: int = 1
    """Parts in which a rank takes its images of a step, one after another: less memory, the same step."""
    gamma: float = 0.5
    """Diversity ratio E[L(G(z))] / E[L(x)] (§3.3)."""
    lambda_k: float = 1e-3
    """Proportional gain of k (§3.4)."""
    eta: Literal[1, 2] = 1
    """Exponent of the pixel-wise loss (§3.1)."""
    lr: float = 1e-4
    """Adam's learning rate at the start."""
    lr_floor: float = 2e-5
    """Halving stops here."""
    scaling: Literal["none", "sqrt", "linear"] = "none"
    """How lr, lr_floor and lambda_k, which are meant for 16 images a step, grow with batch_size / 16."""
    lr_window: int = 8000
    """Halve the learning rate when the mean of M over this many steps did not fall; 0 for never."""
    passes: Literal["single-pass", "joint", "textbook"] = "single-pass"
    """How often D runs: once for each image, once for both batches joined, or three times as the formulas stand."""
    updates: Literal["simultaneous", "alternating"] = "simultaneous"
    """Update D and G from the same parameters (paper), or D first and G through the updated D."""
    latents: Literal["shared", "independent"] = "shared"
    """Whether z_D and z_G are the same draw."""
    ema_half_life: float = 20_000.0
    """Half-life of the averaged generator in images; samples come from it. 0 for no average."""
    carry_steps: int = 16_000
    """Steps over which a vanishing residual's carry goes from 1 to 0."""
    seed: int = 0
    """Everything random follows from it."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    precision: Literal["auto", "float32", "tf32", "bf16", "fp16"] = "auto"
    """auto: bf16 where the device has it natively, else float32."""
    compile: Literal["auto", "off", "default", "max-autotune"] = "auto"
    """torch.compile for the nets. auto: default, but off where a run is too short to gain from it."""
    cuda_graph: Literal["auto", "off"] = "auto"
    """auto: on a GPU a whole step is one CUDA graph."""
    recompute: bool = False
    """Compute the encoder's first level again going back instead of keeping it: less memory, more time."""
    deterministic: bool = False
    """Only operations whose results do not vary between runs."""
    log_every: int = 50
    """Steps between rows of metrics.jsonl."""
    sample_every: int = 500
    """Steps between sample sheets."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 2
    """Checkpoints kept, at least 2."""
    tensorboard: bool = False
    """Write TensorBoard events too."""
    rank_timeout: float = 60.0
    """Seconds that one of several ranks may keep the others waiting before the run ends and names it."""
    requeue_code: int = 0
    """Exit code of a run that SIGTERM or SIGUSR1 ended before its end, for schedulers that start such runs again."""

    def __post_init__(self) -> None:
        _require(0 <= self.gamma <= 1, "gamma", self.gamma, "0 to 1")
        _require(0 <= self.max_bad <= 100, "max_bad", self.max_bad, "0 to 100")
        _require(self.jitter >= 0, "jitter", self.jitter, "whole numbers from 0")
        _require(self.workers is None or self.workers >= 1, "workers", self.workers, "whole numbers from 1")
        _require(self.prefetch >= 1, "prefetch", self.prefetch, "whole numbers from 1")
        _require(self.batch_size >= 1, "batch_size", self.batch_size, "whole numbers from 1")
        _require(self.accumulate >= 1, "accumulate", self.accumulate, "whole numbers from 1")
        divisible = self.batch_size % self.accumulate == 0
        _require(divisible, "batch_size", self.batch_size, f"multiples of accumulate, {self.accumulate}")
        _require(self.rank_timeout >= 1, "rank_timeout", self.rank_timeout, "numbers from 1")
        _require(0 <= self.requeue_code <= 255, "requeue_code", self.requeue_code, "0 to 255")
        _require(self.lr > 0, "lr", self.lr, "numbers above 0")
        _require(self.lr_floor >= 0, "lr_floor", self.lr_floor, "numbers from 0")
        _require(self.lambda_k >= 0, "lambda_k", self.lambda_k, "numbers from 0")
        _require(self.ema_half_life >= 0, "ema_half_life", self.ema_half_life, "numbers from 0")
        require_seed(self.seed)
        _require(self.lr_window >= 0, "lr_window", self.lr_window, "whole numbers from 0")
        _require(self.carry_steps >= 1, "carry_steps", self.carry_steps, "whole numbers from 1")
        _require(self.keep >= 2, "keep", self.keep, "whole numbers from 2")
        textbook = self.passes == "textbook"
        _require(not (self.recompute and textbook), "recompute", True, "False with passes 'textbook', which keeps all")
        for field in ("log_every", "sample_every", "checkpoint_every"):
            _require(getattr(self, field) >= 1, field, getattr(self, field), "whole numbers from 1")
        for field in ("images", "steps", "minutes"):
            value = getattr(self, field)
            _require(value is None or value > 0, field, value, "numbers above 0")

    def require_runnable(self, world: int, *, launched: bool) -> None:
        """Raises UserError for a run without an end, and for what `world` ranks, `launched` by torchrun, cannot do."""
        if self.images is self.steps is self.minutes is None:
            raise UserError("no length was given; accepted: at least one of images, steps, minutes")
        accepted = "0 under torchrun, which would start the ranks again (examples/slurm.sh queues a job again itself)"
        _require(not (self.requeue_code and launched), "requeue_code", self.requeue_code, accepted)
        parts = f"multiples of {world} ranks times accumulate, {self.accumulate}"
        _require(self.batch_size % (world * self.accumulate) == 0, "batch_size", self.batch_size, parts)

    @property
    def scale(self) -> float:
        """Factor of `lr`, `lr_floor` and `lambda_k` for this batch (Goyal et al. 2017; Krizhevsky 2014)."""
        more = self.batch_size / _PAPER_BATCH
        return {"none": 1.0, "sqrt": more**0.5, "linear": more}[self.scaling]


# may differ between a run and its continuation: they change how long, where and how often, not what is learned
# `data` because the images' checksum says whether they are the same elsewhere, `lr` because a lower one cures NaN
FREE_ON_RESUME = frozenset(
    "images steps minutes data max_bad loader workers prefetch lr device passes compile cuda_graph recompute "
    "log_every sample_every checkpoint_every keep tensorboard accumulate rank_timeout requeue_code".split()
)


@dataclass(frozen=True)
class Preset:
    """A named starting point."""

    model: ModelConfig
    train: TrainConfig


def _paper(size: int, gamma: float) -> Preset:
    # paper §4.1: batch 16, lr 1e-4 and halved on a stall, 400-450 thousand steps
    return Preset(ModelConfig(size=size), TrainConfig(gamma=gamma, images=7_000_000, ema_half_life=100_000))


PRESETS: dict[str, Preset] = {
    # small enough for a CPU; a controller and a learning rate ten times the paper's, since it runs 1/90 as long
    "demo": Preset(
        ModelConfig(size=32, filters=16, repeats=1),
        TrainConfig(
            gamma=0.7,
            lambda_k=1e-2,
            lr=1e-3,
            images=76_800,
            ema_half_life=1000,
            sample_every=200,
            checkpoint_every=1000,
        ),
    ),
    "paper-32": _paper(32, 0.5),
    "paper-64": _paper(64, 0.5),
    "paper-128": _paper(128, 0.7),
    "paper-256": _paper(256, 0.7),
}


def from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """Rebuild a config dataclass from parsed JSON. Raises UserError for unknown or ill-typed fields."""
    if not isinstance(values, dict):
        raise UserError(f"{cls.__name__} is {values!r}; accepted: an object with its fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{cls.__name__} has no field {unknown[0]!r}; accepted: {', '.join(fields)}")
    hints = typing.get_type_hints(cls)
    checked = {}
    for name, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, hints[name]):
            raise UserError(f"{cls.__name__}.{name} is {value!r}; accepted: {fields[name].type}")
        checked[name] = value
    return cls(**checked)


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in arguments
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))
