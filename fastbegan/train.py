"""The training loop: files -> data -> step -> run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
import types
import warnings
from pathlib import Path
from typing import Any

import torch

from fastbegan_kernels import normalize_images, tuning

from .checkpoint import load_latest, save_checkpoint
from .counter import Z_D, Z_G, latents
from .data.choose import open_loader
from .data.source import absolute
from .device import make_deterministic, pick_compile, pick_device, pick_precision
from .equilibrium import StallHalving
from .errors import UserError
from .files import make_folder, write_json
from .graph import GraphedStep
from .health import HealthMonitor
from .info import run_seconds
from .models import build, count_parameters
from .plots import save_curves
from .reading import Reading
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

# exit codes; 0 is a run that ended by itself or was asked to by the system
STOPPED_BY_USER, NOT_FINITE = 130, 3
_ANIMATION_FRAMES = 60


class StopRequest:
    """SIGINT, SIGTERM and SIGUSR1 ask for an end at the next step boundary; a second signal ends at once.

    While `patient` is False (nothing is there to be saved yet), the first one ends at once too, by KeyboardInterrupt.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self.patient = False

    def __enter__(self) -> StopRequest:
        names = ("SIGINT", "SIGTERM", "SIGUSR1")  # the last does not exist on Windows
        self._previous = {s: signal.signal(s, self._handle) for n in names if (s := getattr(signal, n, None))}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: types.FrameType | None) -> None:
        if not self.patient or self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number


class Training:
    """One run, from its config to its folder. `run` does it all; the other methods are its parts."""

    def __init__(self, config: RunConfig, out: Path, *, resume: bool, report: Report) -> None:
        """Open or create the run folder, load data, nets and the newest checkpoint. Raises UserError."""
        train = config.train
        if train.images is train.steps is train.minutes is None:
            raise UserError("no length was given; accepted: at least one of images, steps, minutes")
        summary_writer = _summary_writer() if train.tensorboard else None
        if train.deterministic:
            make_deterministic()
        self.device, device_line = pick_device(train.device)
        precision, dtype = pick_precision(train.precision, self.device)
        seconds = run_seconds(config.model, train, self.device) if train.compile == "auto" else 0.0
        compile_mode, compile_line = pick_compile(train.compile, self.device, seconds)
        train = dataclasses.replace(
            train, precision=precision, data=absolute(train.data)
        )  # what the run continues with elsewhere
        self.config = config = dataclasses.replace(config, train=train)
        self.report, self.folder = report, RunFolder(out)
        stored = self._stored(resume)
        self.loader, data_line, self.data = open_loader(train, config.model.size, self.device, report.preparing)
        make_folder(out)
        generator, discriminator = build(config.model, seed=train.seed, device=self.device)
        self.step = TrainStep(generator, discriminator, train, dtype, compile_mode)
        self.advance = GraphedStep(self._work, self.device, enabled=train.cuda_graph == "auto")
        self.schedule = StallHalving(train.lr, train.lr_floor)
        self.health = HealthMonitor()
        self.done, self.images, self.seconds = 0, 0, 0.0  # totals over all sittings
        self._saved_step = -1
        self._waited = 0.0  # seconds for batches, since the last row of metrics
        self._row: tuple[Reading, dict[str, Any]] | None = None  # of metrics, on its way from the device
        if stored is not None:
            self._resume(stored)
        self.folder.write_config(config)  # not before all that could refuse to continue has agreed
        make_folder(self.folder.samples)
        self.folder.nonfinite_file.unlink(missing_ok=True)  # of an earlier sitting
        self._fixed = self._sheet_inputs()
        self._tensorboard: Any = None
        if summary_writer is not None:
            self._tensorboard = summary_writer(str(out / "tensorboard"), purge_step=self.done + 1)
        parameters = count_parameters(generator, discriminator)
        size = f"{config.model.size} px, {parameters:,} parameters (D + G)"
        report.say(f"device     {device_line}; {precision}")
        report.say(f"networks   {config.preset}: {size}; {train.updates} updates, {train.latents} z")
        graph_line = "the whole step one CUDA graph" if self.advance.enabled else "no CUDA graph"
        report.say(f"step       {self.step.describe()}; {compile_line}; {graph_line}")
        report.say(f"data       {data_line}")
        report.say(f"run        {out}" + (f", continued at step {self.done:,}" if self.done else ""))

    def run(self, stop: StopRequest) -> int:
        """Train until a total is reached or someone asks to stop; returns the exit code."""
        train, equilibrium = self.config.train, self.step.equilibrium
        self._row_clock, self._row_images = time.monotonic(), self.images
        self._waited = 0.0
        clock = time.monotonic()
        stop.patient = True
        last = self.fraction() >= 1
        while not last:
            self.advance_one()
            self.seconds, clock = self.seconds + time.monotonic() - clock, time.monotonic()
            last = self.fraction() >= 1 or stop.signal is not None  # decided once: a signal may come at any line below
            if train.lr_window and self.done % train.lr_window == 0:
                self.step.set_lr(self.schedule.update(equilibrium.read_window()))
            sheet_due = last or self.done % train.sample_every == 0 or self.done == train.log_every
            checkpoint_due = last or self.done % train.checkpoint_every == 0
            log_due = last or self.done % train.log_every == 0
            waits = sheet_due or checkpoint_due  # for the device
            finite = self._log(wait=log_due or waits)
            if not finite or (waits and self.step.found_bad.item()):
                return self._stop_not_finite()
            spread = self._sheet() if sheet_due else None
            if log_due:
                self._begin_row(spread)
            else:
                self.report.step(self.fraction(), self.done, self._seconds_left())
            if not self._log(wait=waits):
                return self._stop_not_finite()
            if checkpoint_due:
                before = time.monotonic()
                self._checkpoint()
                self._row_clock += time.monotonic() - before  # as for a sheet
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._finish()
        return STOPPED_BY_USER if stop.signal == signal.SIGINT else 0

    def advance_one(self) -> None:
        """One step, on the batch that is next."""
        begin = time.monotonic()
        self.loader.prepare(self.images)
        self._waited += time.monotonic() - begin
        self.advance()
        self.done, self.images = self.done + 1, self.images + self.config.train.batch_size

    def fraction(self) -> float:
        """How much of the run is done, by the total that is nearest."""
        train = self.config.train
        shares = ((self.images, train.images), (self.done, train.steps), (self.seconds / 60, train.minutes))
        return max(now / total for now, total in shares if total is not None)

    def _work(self) -> None:
        """One step from its counter alone: the batch and the latents are those of the images seen so far."""
        train, width = self.config.train, self.config.model.latent
        position = self.step.number * train.batch_size
        z_d = z_g = latents(train.seed, Z_D, position, train.batch_size, width, self.device)
        if train.latents == "independent":
            z_g = latents(train.seed, Z_G, position, train.batch_size, width, self.device)
        self.step(self.loader.current(position), z_d, z_g)

    def _seconds_left(self) -> float:
        return max(0.0, self.seconds / max(self.fraction(), 1e-9) - self.seconds)

    def _begin_row(self, spread: float | None) -> None:
        """Send a row of metrics on its way from the device; `spread` is the diversity of a sheet of this step."""
        facts = {"step": self.done, "images": self.images, "lr": self.schedule.lr}
        self._row = self.step.begin_reading(), facts | ({} if spread is None else {"diversity": spread})

    def _log(self, *, wait: bool) -> bool:
        """Write the row that is on its way wherever rows go, if it is here or `wait`; False if it is not finite."""
        if self._row is None or not (wait or self._row[0].arrived()):
            return True
        (reading, facts), self._row = self._row, None
        *taken, found_bad = reading.values()
        if found_bad:
            return False
        now, step, images = time.monotonic(), facts.pop("step"), facts.pop("images")
        seconds = max(now - self._row_clock, 1e-9)
        rate, waited = (images - self._row_images) / seconds, min(1.0, self._waited / seconds)
        self._row_clock, self._row_images, self._waited = now, images, 0.0
        row = {"step": step, "images": images, **self.step.equilibrium.means(taken)}
        row |= {"lr": facts.pop("lr"), "images_per_second": round(rate, 2), "data_wait": round(waited, 4), **facts}
        self._warn(self.health.after_log(row["k"]), step)
        self.folder.append_metrics(row)
        if self._tensorboard is not None:
            for name, value in row.items():
                self._tensorboard.add_scalar(name, value, step)
        self.report.training(self.fraction(), row, self._seconds_left())
        return True

    def _sheet_inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        train, count = self.config.train, COLUMNS * ROWS
        ids, _ = self.loader.order.place(torch.arange(count))
        fixed = normalize_images(self.loader.pixels(ids).to(self.device), margin=2 * train.jitter)
        return fixed, sheet_latents(self.config.model.latent, train.seed, count, self.device)

    def _sheet(self) -> float:
        """Write a sample sheet; returns the diversity of its generated images."""
        before = time.monotonic()
        sheet, fake = training_sheet(self.step.average, self.step.discriminator, *self._fixed)
        save_png(self.folder.sheet_file(self.done), sheet)
        spread = diversity(fake)
        self._warn(self.health.after_sheet(spread, self.images), self.done)
        self._row_clock += time.monotonic() - before  # images per second are those of training
        return spread

    def _checkpoint(self) -> None:
        if self._saved_step == self.done:
            return
        state = {
            "step": self.done,
            "images": self.images,
            "seconds": self.seconds,
            "data": self.data,
            "schedule": self.schedule.state_dict(),
            "asked_lr": self.config.train.lr,
            "kernels": tuning.choices(self.device),
            **self.step.training_state(),
        }
        self.folder.write_weights(self.step.average, self.step.discriminator)
        save_checkpoint(self.folder.checkpoints, self.done, state, self.config.train.keep)
        self._saved_step = self.done

    def _stored(self, resume: bool) -> RunConfig | None:
        """The config of the run that this one continues, None for a new one. Raises UserError."""
        if not self.folder.exists():
            self.folder.require_free()
            return None
        if not resume:
            raise UserError(
                f"{self.folder.path} holds a run already; --resume auto continues it, or give another --out"
            )
        stored = self.folder.read_config()
        check_resumable(stored, self.config, self.folder.path)
        return stored

    def _resume(self, stored: RunConfig) -> None:
        state = load_latest(self.folder.checkpoints, self.device)
        if state is None:
            self.folder.rewind(0)
            return
        known = state.get("data") or {"crc32": state["data_crc32"]}
        # a loader of files knows no checksum of pixels, a pack that was given none of files
        if any(None not in (seen, self.data[name]) and seen != self.data[name] for name, seen in known.items()):
            raise UserError(
                f"data {self.config.train.data!r} is not what {self.folder.path} was trained on so far (other pixels); "
                "restore it, or give another --out"
            )
        tuning.adopt(
            self.device, state.get("kernels", {})
        )  # the same kernels as before, not those that are fastest today
        self.step.load_training_state(state)
        self.schedule.load_state_dict(state["schedule"])
        # not config.json's, where the checkpoint knows: a kill may have come between the two
        if state.get("asked_lr", stored.train.lr) != self.config.train.lr:
            self.schedule.lr = self.config.train.lr
        self.step.set_lr(self.schedule.lr)
        self.done, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        self._saved_step = self.done
        self.folder.rewind(self.done)
        for row in self.folder.read_metrics():
            self.health.after_log(row["k"])
            if "diversity" in row:
                self.health.after_sheet(row["diversity"], row["images"])

    def _warn(self, message: str | None, step: int) -> None:
        if message:
            self.report.say(f"warning: step {step:,}: {message}")

    def _stop_not_finite(self) -> int:
        """Say where a number stopped being finite; the weights are those of the step before."""
        step = int(self.step.bad_step.item())
        ids = self.loader.ids((step - 1) * self.config.train.batch_size).tolist()
        k = self.step.equilibrium.k.item()
        dump = {"step": step, "image_ids": ids, "k": k if k == k else "nan", "config": self.config.to_dict()}
        write_json(self.folder.nonfinite_file, dump)
        kept = "the weights were not changed by it"
        if self.config.train.updates == "alternating":
            kept = "G was not changed by it, nor D where it was D's"
        self.report.say(
            f"error: step {step:,} gave a loss, gradient or k that is not finite; {kept}. "
            f"Its image ids and config are in {self.folder.nonfinite_file}; "
            f"go on from the last checkpoint, for instance with: "
            f"fastbegan train --out {self.folder.path} --lr {self.schedule.lr / 2:g}"
        )
        return NOT_FINITE

    def _finish(self) -> None:
        """Curves and animation, and where everything is."""
        if not self.folder.generator_file.exists():
            self.folder.write_weights(self.step.average, self.step.discriminator)
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


def _summary_writer() -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # its protobuf warns about itself
            from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("--tensorboard needs the package tensorboard: pip install 'fastbegan[tensorboard]'") from None
    return SummaryWriter


def train(config: RunConfig, out: Path, *, resume: bool = True) -> int:
    """Train by `config` in the run folder `out`; returns the exit code. Raises UserError for bad input."""
    with StopRequest() as stop, Report() as report:
        training = Training(config, out, resume=resume, report=report)
        with contextlib.closing(training.loader):
            return training.run(stop)
