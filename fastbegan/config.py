"""What can be chosen: frozen dataclasses, checked on construction, and the named presets.

The string under a field is its `--help` text.
"""

from __future__ import annotations

import dataclasses
import functools
import math
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


def _ranged(default: Any, low: float, high: float = math.inf, *, above: bool = False) -> Any:
    """A field of numbers from `low` (or `above` it) to `high`; its type says whether they are whole, or may be None."""
    return dataclasses.field(default=default, metadata={"range": (low, high, above)})


def _check_fields(config: Any) -> None:
    """Raises UserError for the first field whose value is not of its type or out of its range.

    NumPy's numbers, and whole ones written as 1e5, become Python's.
    """
    for field in dataclasses.fields(config):
        hint = _hints(type(config))[field.name]
        value = _plain_number(given := getattr(config, field.name), hint)
        low, high, above = field.metadata.get("range", (-math.inf, math.inf, False))
        fits = _fits(value, hint)
        if fits and "range" in field.metadata and value is not None:
            fits = low <= value <= high and math.isfinite(value) and not (above and value == low)
        _require(fits, field.name, given, _accepted(hint, low, high, above))
        object.__setattr__(config, field.name, value)


def _plain_number(value: Any, hint: Any) -> Any:
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        value = value.item()
    whole = hint is int or int in typing.get_args(hint)
    return int(value) if whole and isinstance(value, float) and value.is_integer() else value


_hints = functools.cache(typing.get_type_hints)


def _fits(value: object, hint: Any) -> bool:
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return any(value == one and type(value) is type(one) for one in arguments)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, arguments[0]) for item in value)
    if arguments:
        return any(_fits(value, argument) for argument in arguments)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def _accepted(hint: Any, low: float, high: float, above: bool) -> str:
    """The values of a field, in words."""
    arguments = [one for one in typing.get_args(hint) if one is not type(None)]
    kind = arguments[0] if arguments else hint
    if typing.get_origin(hint) is Literal:
        return ", ".join(map(str, arguments))
    if kind not in (int, float):
        return {bool: "True, False", str: "text"}.get(kind, str(hint))
    if high < math.inf:
        return f"{low:g} to {high:g}"
    numbers = "whole numbers" if kind is int else "numbers"
    return numbers if low == -math.inf else f"{numbers} {'above' if above else 'from'} {low:g}"


def require_seed(seed: int) -> None:
    """Raises UserError for a seed that torch does not take."""
    seed = _plain_number(seed, int)
    _require(_fits(seed, int) and 0 <= seed < 2**63, "seed", seed, "whole numbers from 0 to 2^63 - 1")


@dataclass(frozen=True)
class ModelConfig:
    """Shape of both networks (paper §3.5). Raises UserError for values that no network can have."""

    size: int = 64
    """Image height and width in pixels: 8 * 2^k."""
    filters: int = _ranged(128, 1)
    """n, the number of channels that every width is a multiple of."""
    hidden: int = _ranged(64, 1)
    """N_h, the size of the auto-encoder's code."""
    latent: int = _ranged(64, 1)
    """N_z, the size of the generator's input."""
    widths: tuple[int, ...] | None = None
    """Encoder output width of each level, in multiples of filters; one a level from `size` down to 8."""
    repeats: int = _ranged(2, 1)
    """Convolutions a level."""
    skips: bool = True
    """Decoder skip connections from its 8x8 tensor (§3.5.1)."""
    vanishing: bool = False
    """Vanishing residuals: layers fade in over the first 16,000 steps (§3.5.1)."""

    def __post_init__(self) -> None:
        object.__setattr__(self, "size", _plain_number(self.size, int))
        levels = (self.size // 8).bit_length() if _fits(self.size, int) else 0
        sizes = "8 * 2^k: 8, 16, 32, 64, ..."
        _require(levels > 0 and self.size == 8 << (levels - 1), "size", self.size, sizes)
        widths = STANDARD_WIDTHS.get(self.size) if self.widths is None else self.widths
        if widths is None:
            raise UserError(
                f"size {self.size} has no standard widths; give widths, one number for each of {levels} levels"
            )
        if not isinstance(widths, str) and hasattr(widths, "__iter__"):
            widths = tuple(_plain_number(width, int) for width in widths)
        whole = _fits(widths, tuple[int, ...]) and all(width >= 1 for width in widths)
        _require(whole and len(widths) == levels, "widths", widths, f"{levels} whole numbers from 1")
        object.__setattr__(self, "widths", widths)
        _check_fields(self)

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
class TrainConfig:
    """How to train (paper §3.2-3.4, §4.1). Raises UserError for values out of range."""

    data: str = "faces"
    """faces (procedural portraits; faces:COUNT for another number of them), a folder of images, a .tar (webdataset) or
    .tfrecord file or a folder of them, a .pack file, cifar10:ROOT or fashion-mnist:ROOT."""
    crop: str = "center"
    """What to cut from each image before scaling: center (largest square), none (stretch), pixels (128), or celeba
    (the face in CelebA's aligned images)."""
    max_bad: float = _ranged(1.0, 0, 100)
    """Percentage of broken files above which a folder is refused; below, they are named and left out."""
    flip: bool = True
    """Mirror half of the images left-right."""
    jitter: int = _ranged(0, 0)
    """Scale images to 2 * jitter pixels more than shown and show a random window of them, another one each epoch."""
    loader: Literal["auto", "resident", "packed", "dali", "torch"] = "auto"
    """Where batches come from: the packed set in the GPU's memory, the packed file, or the files themselves, by DALI
    or torch's DataLoader. auto: resident where it fits, else packed."""
    workers: int | None = _ranged(None, 1)
    """Processes or threads that decode files. Default: as many as there are cores to pack, 2 to train."""
    prefetch: int = _ranged(2, 1)
    """Batches that the loaders dali and torch have ready."""
    images: int | None = _ranged(None, 1)
    """Stop after this many images seen in all, resumed runs included."""
    steps: int | None = _ranged(None, 1)
    """Stop after this many steps in all."""
    minutes: float | None = _ranged(None, 0, above=True)
    """Stop after this many minutes of training in all."""
    batch_size: int = _ranged(16, 1)
    """Images a step, of all ranks together."""
    accumulate: int = _ranged(1, 1)
    """Parts in which a rank takes its images of a step, one after another: less memory, the same step."""
    gamma: float = _ranged(0.5, 0, 1)
    """Diversity ratio E[L(G(z))] / E[L(x)] (§3.3)."""
    lambda_k: float = _ranged(1e-3, 0)
    """Proportional gain of k (§3.4)."""
    eta: Literal[1, 2] = 1
    """Exponent of the pixel-wise loss (§3.1)."""
    lr: float = _ranged(1e-4, 0, above=True)
    """Adam's learning rate at the start."""
    lr_floor: float = _ranged(2e-5, 0)
    """Halving stops here."""
    scaling: Literal["none", "sqrt", "linear"] = "none"
    """How lr, lr_floor and lambda_k, which are meant for 16 images a step, grow with batch_size / 16."""
    lr_window: int = _ranged(8000, 0)
    """Halve the learning rate when the mean of M over this many steps did not fall; 0 for never."""
    passes: Literal["single-pass", "joint", "textbook"] = "single-pass"
    """How often D runs: once for each image, once for both batches joined, or three times as the formulas stand."""
    updates: Literal["simultaneous", "alternating"] = "simultaneous"
    """Update D and G from the same parameters (paper), or D first and G through the updated D."""
    latents: Literal["shared", "independent"] = "shared"
    """Whether z_D and z_G are the same draw."""
    ema_half_life: float = _ranged(20_000.0, 0)
    """Half-life of the averaged generator in images; samples come from it. 0 for no average."""
    carry_steps: int = _ranged(16_000, 1)
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
    cudnn_search: Literal["auto", "off"] = "auto"
    """auto: on a GPU cuDNN times its algorithms for each shape, but not with deterministic."""
    recompute: bool = False
    """Compute the encoder's first level again going back instead of keeping it: less memory, more time."""
    deterministic: bool = False
    """Only operations whose results do not vary between runs."""
    log_every: int = _ranged(50, 1)
    """Steps between rows of metrics.jsonl."""
    sample_every: int = _ranged(500, 1)
    """Steps between sample sheets."""
    checkpoint_every: int = _ranged(1000, 1)
    """Steps between checkpoints."""
    keep: int = _ranged(2, 2)
    """Checkpoints kept, at least 2."""
    tensorboard: bool = False
    """Write TensorBoard events too."""
    rank_timeout: float = _ranged(60.0, 1)
    """Seconds that one of several ranks may keep the others waiting before the run ends and names it."""
    requeue_code: int = _ranged(0, 0, 255)
    """Exit code of a run that SIGTERM or SIGUSR1 ended before its end, for schedulers that start such runs again."""

    def __post_init__(self) -> None:
        require_seed(self.seed)
        _check_fields(self)
        divisible = self.batch_size % self.accumulate == 0
        _require(divisible, "batch_size", self.batch_size, f"multiples of accumulate, {self.accumulate}")
        textbook = self.passes == "textbook"
        _require(not (self.recompute and textbook), "recompute", True, "False with passes 'textbook', which keeps all")

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
    "images steps minutes data max_bad loader workers prefetch lr device passes compile cuda_graph cudnn_search "
    "recompute log_every sample_every checkpoint_every keep tensorboard accumulate rank_timeout requeue_code".split()
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


def find_preset(name: str) -> Preset:
    """Raises UserError for a name that no preset has."""
    if name not in PRESETS:
        raise UserError(f"preset is {name!r}; accepted: {', '.join(PRESETS)}")
    return PRESETS[name]


def from_dict(cls: type[Any], values: dict[str, Any]) -> Any:
    """Rebuild a config dataclass from parsed JSON. Raises UserError for unknown or ill-typed fields."""
    if not isinstance(values, dict):
        raise UserError(f"{cls.__name__} is {values!r}; accepted: an object with its fields")
    fields = {field.name: field for field in dataclasses.fields(cls)}
    if unknown := sorted(set(values) - set(fields)):
        raise UserError(f"{cls.__name__} has no field {unknown[0]!r}; accepted: {', '.join(fields)}")
    hints = _hints(cls)
    checked = {}
    for name, value in values.items():
        value = tuple(value) if isinstance(value, list) else value
        if not _fits(value, hints[name]):
            raise UserError(f"{cls.__name__}.{name} is {value!r}; accepted: {fields[name].type}")
        checked[name] = value
    return cls(**checked)
