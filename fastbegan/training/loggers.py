"""Where rows of metrics and sheets go beside the run folder's own files: TensorBoard, Weights & Biases."""

from __future__ import annotations

import os
import secrets
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import UserError
from ..files import atomic
from ..runs.folder import RunConfig

Open = Callable[[Path, RunConfig, int], "Logger"]
"""Takes the run folder, its config, and the number of steps done; returns a logger that goes on after them."""


class Logger(ABC):
    """Takes each row of metrics.jsonl, and each sheet. Only the first of several ranks has loggers."""

    @abstractmethod
    def row(self, row: dict[str, Any]) -> None:
        """Log a row, as metrics.jsonl holds it."""

    @abstractmethod
    def sheet(self, step: int, file: Path) -> None:
        """Log the sheet of `step`, a PNG."""

    @abstractmethod
    def close(self, *, failed: bool) -> None:
        """Nothing comes any more; `failed` where the run ends by an error."""


class TensorBoard(Logger):
    """Event files in the run folder's `tensorboard/`. Steps that are made again after a crash replace the old ones."""

    def __init__(self, writer: type[Any], folder: Path, done: int) -> None:
        self._writer = writer(str(folder / "tensorboard"), purge_step=done + 1, flush_secs=10)

    @classmethod
    def prepared(cls) -> Open:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its protobuf version warns
            from torch.utils.tensorboard import SummaryWriter
        return lambda folder, config, done: cls(SummaryWriter, folder, done)

    def row(self, row: dict[str, Any]) -> None:
        for name, value in row.items():
            self._writer.add_scalar(name, value, row["step"])

    def sheet(self, step: int, file: Path) -> None:
        with Image.open(file) as image:
            self._writer.add_image("samples", np.asarray(image.convert("RGB")), step, dataformats="HWC")

    def close(self, *, failed: bool) -> None:
        self._writer.close()


class Wandb(Logger):
    """A run of Weights & Biases, which a continued run continues.

    It is named after the run folder, and its own files lie in the folder's `wandb/`. The project is WANDB_PROJECT, by
    default `fastbegan`. WANDB_MODE=offline needs no account. Steps that are made again after a crash are there twice.
    """

    def __init__(self, wandb: Any, folder: Path, config: RunConfig) -> None:
        self._wandb = wandb
        settings = config.to_dict()
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT") or "fastbegan",
                id=_kept_id(folder / "wandb" / "id"),
                name=folder.resolve().name,
                dir=str(folder),
                config=settings,
                resume="allow",
            )
        except wandb.errors.Error as error:
            reason = str(error).strip().partition("\n")[0]
            raise UserError(f"wandb cannot start ({reason}); `wandb login`, or WANDB_MODE=offline") from None
        # steps of its own could not go back, as those of a run do that continues from an earlier checkpoint
        self._run.define_metric("*", step_metric="step")

    @classmethod
    def prepared(cls) -> Open:
        import wandb

        return lambda folder, config, done: cls(wandb, folder, config)

    def row(self, row: dict[str, Any]) -> None:
        self._run.log(row)

    def sheet(self, step: int, file: Path) -> None:
        self._run.log({"step": step, "samples": self._wandb.Image(str(file))})

    def close(self, *, failed: bool) -> None:
        self._run.finish(exit_code=int(failed))


_LOGGERS: dict[str, type[TensorBoard] | type[Wandb]] = {"tensorboard": TensorBoard, "wandb": Wandb}


def prepare(name: str) -> Open:
    """Import what the logger of this name needs; nothing is written. Raises UserError where a package is missing."""
    try:
        return _LOGGERS[name].prepared()
    except ImportError:
        raise UserError(f"--log {name} needs the package {name}: pip install 'fastbegan[{name}]'") from None


def _kept_id(file: Path) -> str:
    """The id of this folder's run, made with its first."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        with atomic(file) as opened:
            opened.write(secrets.token_hex(4).encode())
    return file.read_text(encoding="ascii").strip()
