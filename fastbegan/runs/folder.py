"""The run folder: a run's config, metrics, pictures, checkpoints and weights."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save

from ..config import FREE_ON_RESUME, PRESETS, ModelConfig, TrainConfig
from ..errors import UserError
from ..fields import from_dict, require
from ..files import HeldError, atomic, locked, make_folder, read_json, removed_if_empty, visible, write_json, writing
from ..nets.models import Generator
from ..version import __version__

FORMAT = 1  # of config.json; a file without a number is of format 0
_PATIENCE = 5.0  # seconds for the process before to end: it may have been killed just now


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run, resolved: the content of `config.json`."""

    preset: str
    model: ModelConfig
    train: TrainConfig

    def to_dict(self) -> dict[str, Any]:
        return {"format": FORMAT, "fastbegan": __version__, **dataclasses.asdict(self)}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> RunConfig:
        """The inverse of `to_dict`. Raises UserError where a part is missing or wrong."""
        if missing := [name for name in ("preset", "model", "train") if name not in values]:
            raise UserError(f"no {missing[0]!r} in it")
        values = _of_this_format(values)
        # it becomes part of a folder's name
        accepted = "letters, digits, '.', '_' and '-', not first '.'"
        require(re.fullmatch(r"[\w-][\w.-]*", str(values["preset"])) is not None, "preset", values["preset"], accepted)
        return cls(
            str(values["preset"]),
            from_dict(ModelConfig, values["model"]),
            from_dict(TrainConfig, values["train"]),
        )


def _of_this_format(values: dict[str, Any]) -> dict[str, Any]:
    """The content of a config.json of any format, as this version would write it. Raises UserError for a later one."""
    written = values.get("format", 0)
    if type(written) is not int or not 0 <= written <= FORMAT:
        raise UserError(f"format is {written!r}; accepted: 0 to {FORMAT}")
    train = values["train"]
    if written == 0 and isinstance(train, dict):
        train = dict(train)
        data = str(train.get("data", "faces"))
        if data.partition(":")[0] == "faces":
            train["data"] = data.replace("faces", "portraits", 1)
    if isinstance(train, dict) and "tensorboard" in train:
        train = {name: value for name, value in train.items() if name != "tensorboard"}
        train["log"] = "tensorboard" if values["train"]["tensorboard"] else ""
    return values | {"train": train}


def read_config(file: Path) -> RunConfig:
    """The settings in a run's config.json. Raises UserError where it is none."""
    try:
        return RunConfig.from_dict(read_json(file))
    except UserError as error:
        raise UserError(f"{file} is not a config of this version: {error}") from None


def is_config(preset: str) -> bool:
    """Whether a value of `--preset` names a run's config.json."""
    return preset.endswith(".json")


def settings_of(preset: str) -> RunConfig:
    """The settings of a preset, or of the run whose config.json is given. Raises UserError where there is none."""
    if is_config(preset):
        return read_config(Path(preset))
    if preset not in PRESETS:
        raise UserError(f"preset is {preset!r}; accepted: {', '.join(PRESETS)}, or a run's config.json")
    return RunConfig(preset, PRESETS[preset].model, PRESETS[preset].train)


class RunFolder:
    """Paths and files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config_file = path / "config.json"
        self.metrics_file = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.generator_file = path / "generator.safetensors"
        self.discriminator_file = path / "discriminator.safetensors"
        self.curves_file = path / "curves.png"
        self.animation_file = path / "progress.gif"
        self.nonfinite_file = path / "nonfinite.json"

    def exists(self) -> bool:
        """Whether the folder holds a run."""
        return self.config_file.exists()

    @contextlib.contextmanager
    def reserved(self) -> Iterator[None]:
        """Keep other processes from training in the folder; made for it, it goes again if it stays empty.

        Raises UserError if another process trains in it, and where it cannot be written to.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UserError(f"{self.path} is a file and cannot be written to as a folder; give another --out")
        with removed_if_empty(self.path):
            make_folder(self.path)
            try:
                with locked(self.path / "run", seconds=_PATIENCE):
                    yield
            except HeldError as holder:
                raise UserError(f"{self.path} is in use by {holder}; stop that one, or give another --out") from None

    def require_free(self) -> None:
        """Raises UserError if the folder holds anything but a run, which could be overwritten."""
        if visible(self.path):
            raise UserError(f"{self.path} is not empty and holds no run (no config.json); give another --out")

    def read_config(self) -> RunConfig:
        """The settings in config.json. Raises UserError if this is no run folder."""
        if not self.exists():
            raise UserError(
                f"{self.path} is no run folder (it has no config.json); give what `fastbegan train` printed"
            )
        return read_config(self.config_file)

    def write_config(self, config: RunConfig) -> None:
        write_json(self.config_file, config.to_dict())

    def append_metrics(self, row: dict[str, Any]) -> None:
        """Add one row to metrics.jsonl."""
        with writing(self.metrics_file), self.metrics_file.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")

    def read_metrics(self) -> list[dict[str, Any]]:
        """The rows of metrics.jsonl, without a last line that a crash cut off. Raises UserError for invalid JSON."""
        if not self.metrics_file.exists():
            return []
        lines = self.metrics_file.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        try:
            return [json.loads(line) for line in lines if line.endswith("}\n")]
        except ValueError as error:
            raise UserError(f"{self.metrics_file} is damaged ({error}); remove the line, or the file") from None

    def rewind(self, step: int) -> None:
        """Remove rows and sheets of steps after `step`, which a continued run makes again."""
        for sheet in self.samples.glob("*.png"):
            if sheet.stem.isdecimal() and int(sheet.stem) > step:
                sheet.unlink()
        if not self.metrics_file.exists():
            return
        rows = [row for row in self.read_metrics() if row["step"] <= step]
        with atomic(self.metrics_file) as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows).encode())

    def sheet_file(self, step: int) -> Path:
        return self.samples / f"{step:09d}.png"

    def contents(self, step: int) -> list[str]:
        """Lines with the name and path of each result of a run that ended at `step`."""
        paths = {
            "samples": self.sheet_file(step),
            "animation": self.animation_file,
            "curves": self.curves_file,
            "generator": self.generator_file,
            "checkpoint": self.checkpoints,
        }
        return [f"{name:<10}  {path}" for name, path in paths.items()]

    def write_weights(self, modules: dict[str, torch.Tensor]) -> None:
        """Write the averaged generator and the discriminator as safetensors: float32, contiguous.

        Args:
            modules: `TrainStep.state_dict()`.
        """
        for path, prefix in ((self.generator_file, "average."), (self.discriminator_file, "discriminator.")):
            state = {name.removeprefix(prefix): value for name, value in modules.items() if name.startswith(prefix)}
            with atomic(path) as file:
                file.write(save({name: value.detach().cpu().contiguous() for name, value in state.items()}))

    def load_generator(self, device: torch.device | str = "cpu") -> Generator:
        """The averaged generator in eval mode, channels_last. Raises UserError if it is missing or does not fit."""
        config = self.read_config()
        if not self.generator_file.exists():
            raise UserError(f"{self.generator_file} does not exist; train until the first checkpoint")
        generator = Generator(config.model)
        try:
            generator.load_state_dict(load_file(self.generator_file))
        except Exception as error:  # safetensors raises its own types, load_state_dict RuntimeError
            raise UserError(f"{self.generator_file} does not fit {self.config_file}: {error}") from None
        return generator.to(device=device, memory_format=torch.channels_last).eval()  # pyright: ignore[reportCallIssue]


def _made(path: Path) -> bool:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)  # apart: a link to nothing in its place exists, too
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made ({error.strerror}); give --out, a folder that can") from None
    try:
        path.mkdir()
    except FileExistsError:
        return False
    except OSError as error:
        raise UserError(f"{path} cannot be made ({error.strerror}); give --out, a folder that can") from None
    return True


@contextlib.contextmanager
def new_run_folder(preset: str) -> Iterator[Path]:
    """A new folder in runs/, named by the time and the preset; it goes again if it stays empty.

    Raises UserError where none can be made.
    """
    stem = f"{time.strftime('%Y%m%d-%H%M%S')}-{preset}"
    with removed_if_empty(Path("runs")):
        path, number = Path("runs", stem), 1
        while not _made(path):  # it is of a run that began in the same second
            number += 1
            path = path.with_name(f"{stem}-{number}")
        try:
            yield path
        finally:
            with contextlib.suppress(OSError):  # something is in it
                path.rmdir()


def check_resumable(stored: RunConfig, wanted: RunConfig, folder: Path) -> None:
    """Raises UserError if a continued run has other settings than stored; it names those that may not change."""
    differences = []
    if stored.preset != wanted.preset:
        differences.append(("preset", stored.preset, wanted.preset))
    for part in ("model", "train"):
        old, new = dataclasses.asdict(getattr(stored, part)), dataclasses.asdict(getattr(wanted, part))
        differences += [(name, old[name], new[name]) for name in old if old[name] != new[name]]
    blocked = [f"{name} {old!r} -> {new!r}" for name, old, new in differences if name not in FREE_ON_RESUME]
    if blocked:
        raise UserError(
            f"{folder} holds a run with other settings ({', '.join(blocked)}); keep them or give another --out"
        )
