"""The training loop: files -> data -> step -> run folder."""

from __future__ import annotations

import signal
import time
import types
import warnings
from pathlib import Path
from typing import Any

import torch

from .checkpoint import load_latest, save_checkpoint
from .counter import Z_D, Z_G, latents
from .data.loader import PackedLoader
from .data.source import load_images
from .device import make_deterministic, pick_device, pick_precision
from .equilibrium import StallHalving
from .errors import UserError
from .files import make_folder, write_json
from .health import HealthMonitor
from .models import build, count_parameters
from .plots import save_curves
from .report import Report
from .run import RunConfig, RunFolder, check_resumable
from .samples import (
    COLUMNS,
    ROWS,
    diversity,
    generated_band,
    save_gif,
    save_png,
    sheet_latents,
    training_sheet,
)
from .step import TrainStep

STOPPED_BY_USER, NOT_FINITE = (
    130,
    3,
)  # exit codes; 0 is a run that ended by itself or was asked to by the system
_ANIMATION_FRAMES = 60


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 ask for an end at the next step boundary; a second signal ends at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    def __enter__(self) -> StopRequest:
        names = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last does not exist on Windows
        self._previous = {s: signal.signal(s, self._handle) for n in names if (s := getattr(signal, n, None))}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


class Training:
    """One run, from its config to its folder. `run` does it all; the other methods are its parts."""

    def __init__(self, config: RunConfig, out: Path, *, resume: bool, report: Report) -> None:
        """Open or create the run folder, load data, nets and the newest checkpoint. Raises UserError."""
        self.config, self.report = config, report
        train = config.train
        if train.images is train.steps is train.minutes is None:
            raise UserError("no length was given; accepted: at least one of images, steps, minutes")
        self.folder = RunFolder(out)
        if self.folder.exists():
            if not resume:
                raise UserError(f"{out} holds a run already; use --resume auto to continue it, or another --out")
            check_resumable(self.folder.read_config(), config, out)
        if train.deterministic:
            make_deterministic()
        self.device, device_line = pick_device(train.device)
        precision, dtype = pick_precision(train.precision, self.device)
        data = load_images(
            train.data,
            config.model.size,
            train.crop,
            report.preparing,
            minimum=train.batch_size,
            max_bad=train.max_bad,
        )
        make_folder(out)
        make_folder(self.folder.samples)
        self.loader = PackedLoader(
            data.images, batch_size=train.batch_size, seed=train.seed, flip=train.flip, device=self.device
        )
        generator, discriminator = build(config.model, seed=train.seed, device=self.device)
        self.step = TrainStep(generator, discriminator, train, dtype)
        self.schedule = StallHalving(train.lr, train.lr_floor)
        self.health = HealthMonitor()
        self.done, self.images, self.seconds = 0, 0, 0.0  # totals over all sittings
        self.resumed = self._resume()
        self.folder.write_config(config)
        self.folder.nonfinite_file.unlink(missing_ok=True)  # of an earlier sitting
        self._saved_step = self.done if self.resumed else -1
        self._fixed = self._sheet_inputs()
        parameters = count_parameters(generator, discriminator)
        updates = f"{train.updates}, {train.latents} z"
        report.say(f"device     {device_line}; {precision}")
        report.say(f"networks   {config.preset}: {config.model.size} px, {parameters:,} parameters (D + G); {updates}")
        report.say(f"data       {data.description}")
        report.say(f"run        {out}" + (f", continued at step {self.done:,}" if self.resumed else ""))

    def run(self) -> int:
        """Train until a total is reached or someone asks to stop; returns the exit code."""
        train, equilibrium = self.config.train, self.step.equilibrium
        tensorboard = _tensorboard(self.folder.path, self.done) if train.tensorboard else None
        clock = self._row_clock = time.monotonic()
        self._row_images = self.images
        row: dict[str, Any] | None = None
        with StopRequest() as stop:
            while self.fraction() < 1 and stop.signal is None:
                real = self.loader.batch(self.images)
                z_d, z_g = self._latents()
                self.step(real, z_d, z_g, self.done + 1)
                self.done, self.images = self.done + 1, self.images + train.batch_size
                self.seconds, clock = self.seconds + time.monotonic() - clock, time.monotonic()
                if train.lr_window and self.done % train.lr_window == 0:
                    self.step.set_lr(self.schedule.update(equilibrium.read_window()))
                last = self.fraction() >= 1 or stop.signal is not None
                if last or self.done % train.log_every == 0:
                    row = self._row()
                    if self.step.found_bad.item():
                        return self._stop_not_finite()
                    self._warn(self.health.after_log(row["k"]))
                    if last or self.done % train.sample_every == 0 or self.done == train.log_every:
                        row["diversity"] = self._sheet()
                    self.folder.append_metrics(row)
                    if tensorboard is not None:
                        for name, value in row.items():
                            tensorboard.add_scalar(name, value, self.done)
                    elapsed = self.seconds / max(self.fraction(), 1e-9) - self.seconds
                    self.report.training(self.fraction(), row, max(elapsed, 0.0))
                elif self.done % train.sample_every == 0:
                    self._sheet()
                if last or self.done % train.checkpoint_every == 0:
                    if self.step.found_bad.item():
                        return self._stop_not_finite()
                    self._checkpoint()
        if tensorboard is not None:
            tensorboard.close()
        self._finish()
        return STOPPED_BY_USER if stop.signal == signal.SIGINT else 0

    def fraction(self) -> float:
        """How much of the run is done, by the total that is nearest."""
        train = self.config.train
        shares = ((self.images, train.images), (self.done, train.steps), (self.seconds / 60, train.minutes))
        return max(now / total for now, total in shares if total is not None)

    def _latents(self) -> tuple[torch.Tensor, torch.Tensor]:
        train, width = self.config.train, self.config.model.latent
        z_d = latents(train.seed, Z_D, self.images, train.batch_size, width, self.device)
        if train.latents == "shared":
            return z_d, z_d
        return z_d, latents(train.seed, Z_G, self.images, train.batch_size, width, self.device)

    def _row(self) -> dict[str, Any]:
        means = self.step.equilibrium.read()
        now = time.monotonic()
        rate = (self.images - self._row_images) / max(now - self._row_clock, 1e-9)
        self._row_clock, self._row_images = now, self.images
        row = {"step": self.done, "images": self.images, **means}
        return {**row, "lr": self.schedule.lr, "images_per_second": round(rate, 2)}

    def _sheet_inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        train, count = self.config.train, COLUMNS * ROWS
        fixed = PackedLoader(self.loader.images, batch_size=count, seed=train.seed, flip=False, device=self.device)
        return fixed.batch(0), sheet_latents(self.config.model.latent, train.seed, count, self.device)

    def _sheet(self) -> float:
        """Write a sample sheet; returns the diversity of its generated images."""
        before = time.monotonic()
        sheet, fake = training_sheet(self.step.average, self.step.discriminator, *self._fixed)
        save_png(self.folder.sheet_file(self.done), sheet)
        spread = diversity(fake)
        self._warn(self.health.after_sheet(spread, self.images))
        self._row_clock += time.monotonic() - before  # images per second are those of training
        return spread

    def _checkpoint(self) -> None:
        if self._saved_step == self.done:
            return
        state = {
            "step": self.done,
            "images": self.images,
            "seconds": self.seconds,
            "schedule": self.schedule.state_dict(),
            **self.step.training_state(),
        }
        save_checkpoint(self.folder.checkpoints, self.done, state, self.config.train.keep)
        self.folder.write_weights(self.step.average, self.step.discriminator)
        self._saved_step = self.done

    def _resume(self) -> bool:
        state = load_latest(self.folder.checkpoints, self.device)
        if state is None:
            self.folder.rewind_metrics(0)
            return False
        self.step.load_training_state(state)
        self.schedule.load_state_dict(state["schedule"])
        self.step.set_lr(self.schedule.lr)
        self.done, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        self.folder.rewind_metrics(self.done)
        for row in self.folder.read_metrics():
            self.health.after_log(row["k"])
            if "diversity" in row:
                self.health.after_sheet(row["diversity"], row["images"])
        return True

    def _warn(self, message: str | None) -> None:
        if message:
            self.report.say(f"warning: step {self.done:,}: {message}")

    def _stop_not_finite(self) -> int:
        """Say where a number stopped being finite; the weights are those of the step before."""
        step = int(self.step.bad_step.item())
        ids = self.loader.ids((step - 1) * self.config.train.batch_size).tolist()
        k = self.step.equilibrium.k.item()
        dump = {"step": step, "image_ids": ids, "k": k if k == k else "nan", "config": self.config.to_dict()}
        write_json(self.folder.nonfinite_file, dump)
        self.report.say(
            f"error: step {step:,} gave a loss, gradient or k that is not finite; the weights were not changed by it. "
            f"Its image ids and config are in {self.folder.nonfinite_file}; "
            "continue from the last checkpoint with the same command, or try a lower --lr"
        )
        return NOT_FINITE

    def _finish(self) -> None:
        """Curves and animation, and where everything is."""
        rows = self.folder.read_metrics()
        model = self.config.model
        title = f"{self.config.preset}: {model.size} px, n = {model.filters}, gamma {self.config.train.gamma:g}"
        save_curves(self.folder.curves_file, rows, title)
        _save_animation(self.folder)
        finished = self.fraction() >= 1
        say, folder = self.report.say, self.folder
        say(f"{'done' if finished else 'stopped'} after {self.done:,} steps, {self.images:,} images")
        say(f"  samples     {folder.sheet_file(self.done)}")
        say(f"  animation   {folder.animation_file}")
        say(f"  curves      {folder.curves_file}")
        say(f"  generator   {folder.generator_file}")
        say(f"  checkpoint  {folder.checkpoints}")
        if finished:
            say(f"more faces: fastbegan sample {folder.path}")
        else:
            say(f"to continue: fastbegan train --out {folder.path}")


def _save_animation(folder: RunFolder) -> None:
    from PIL import Image

    sheets = sorted(folder.samples.glob("*.png"))
    stride = max(1, -(-len(sheets) // _ANIMATION_FRAMES))
    chosen = sheets[::-1][::stride][::-1]  # evenly spaced, the newest always among them
    frames = []
    for path in chosen:
        with Image.open(path) as sheet:
            frames.append(generated_band(sheet.convert("RGB")))
    if frames:
        save_gif(folder.animation_file, frames, milliseconds=250)


def _tensorboard(path: Path, step: int) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its protobuf warns about itself
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install 'fastbegan[tensorboard]'") from None
    return SummaryWriter(str(path / "tensorboard"), purge_step=step + 1)


def train(config: RunConfig, out: Path, *, resume: bool = True) -> int:
    """Train by `config` in the run folder `out`; returns the exit code. Raises UserError for bad input."""
    with Report() as report:
        return Training(config, out, resume=resume, report=report).run()
