"""`fastbegan train`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from ..config import ModelConfig, TrainConfig
from ..fields import require
from ..runs.folder import RunConfig, is_config, settings_of
from ..training.loop import train


@dataclass(frozen=True)
class Train:
    """Train a BEGAN. Without options: the demo, on procedural faces, into a new folder under runs/."""

    model: Annotated[ModelConfig, tyro.conf.arg(name="")]
    train: Annotated[TrainConfig, tyro.conf.arg(name="")]
    preset: str = "demo"
    """Where all other options start from: demo, demo-64, paper-32, paper-64, paper-128, paper-256, or a run's
    config.json, to repeat it."""
    out: Path | None = None
    """The run folder. A folder that holds a run is continued, with that run's settings. Default: a new one in runs/."""
    resume: Literal["auto", "off"] = "auto"
    """off: refuse a folder that holds a run."""
    profile: int = 0
    """Trace so many steps, after the first six, into the run folder's profile/: torch.profiler, and memory on a GPU."""

    def run(self) -> int:
        require(self.profile >= 0, "profile", self.profile, "whole numbers from 0")
        preset = settings_of(self.preset).preset if is_config(self.preset) else self.preset
        config = RunConfig(preset, self.model, self.train)
        return train(config, self.out, resume=self.resume == "auto", profile=self.profile)
