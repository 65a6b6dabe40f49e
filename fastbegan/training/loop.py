"""The training loop: files -> data -> step -> run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import signal
import time
from pathlib import Path
from typing import Any

import torch

from fastbegan_kernels import normalize_images, tuning

from ..counter import Z_D, Z_G, latents
from ..data.choose import open_loader, same_images
from ..data.source import absolute
from ..device import pick_compile, pick_device, pick_precision, set_backends
from ..display import Display, summary_writer
from ..distributed.ranks import Ranks
from ..distributed.stop import STOPPED_BY_USER, StopRequest
from ..errors import UserError
from ..files import make_folder, write_json
from ..nets.models import build, count_parameters
from ..runs.checkpoint import Writer, copied, load_for_all, save_checkpoint
from ..runs.curves import save_curves
from ..runs.folder import RunConfig, RunFolder, check_resumable, new_run_folder
from ..runs.sheets import (
    COLUMNS,
    ROWS,
    diversity,
    save_animation,
    save_png,
    sheet_latents,
    training_sheet,
)
from .cost import run_seconds
from .graph import GraphedStep
from .health import HealthMonitor, not_finite
from .reading import Reading
from .schedule import StallHalving
from .step import TrainStep
from .tune import tune_for_all

# exit code; 0 is a run that ended by itself or was asked to by the system, 4 (watch.LOST) and 5 are of several ranks
NOT_FINITE = 3
_LINGER = 15.0  # seconds that a checkpoint may still take when a rank was lost; torchrun waits 30
_SETTLED = 4  # steps after the first: by then all has compiled


class Training:
    """One run, from its config to its folder. `run` does it all; the other methods are its parts."""

    def __init__(
        self, config: RunConfig, out: Path, *, resume: bool, display: Display, ranks: Ranks | None = None
    ) -> None:
        """Open or create the run folder, load data, nets and the newest checkpoint. Raises UserError.

        Of several ranks only the first touches the folder; the others take from it what they need.
        """
        self.ranks = ranks = ranks or Ranks()
        train = config.train
        train.require_runnable(ranks.world, launched=ranks.launched)
        events = summary_writer() if train.tensorboard and ranks.first else None
        self.device, device_line = pick_device(train.device, None if ranks.alone else ranks.local)
        precision, dtype = pick_precision(train.precision, self.device)
        set_backends(precision, deterministic=train.deterministic, search=train.cudnn_search == "auto")
        ranks.require_same("device", self.device.type)
        ranks.require_same("precision", precision)
        seconds = run_seconds(config.model, train, self.device) if train.compile == "auto" else 0.0
        compile_mode, compile_line = pick_compile(train.compile, self.device, seconds)
        # what the run continues with elsewhere
        train = dataclasses.replace(train, precision=precision, data=absolute(train.data))
        self.config = config = dataclasses.replace(config, train=train)
        self.display, self.folder = display, RunFolder(out)
        stored = ranks.from_first(self._stored(resume) if ranks.first else None)
        self.loader, data_line, self.data = open_loader(
            train, config.model.size, self.device, display.preparing, rank=ranks.rank, world=ranks.world
        )
        ranks.require_same("data", self.data, same_images)
        state = None if stored is None else load_for_all(self.folder.checkpoints, self.device, ranks)
        if state is not None:  # the kernels of the run so far, not those that are fastest today
            tuning.adopt(self.device, state.get("kernels", {}))
        tune_for_all(config.model, train, self.device, dtype, ranks, display.trying)
        generator, discriminator = build(config.model, seed=train.seed, device=self.device)
        self.step = TrainStep(generator, discriminator, train, dtype, compile_mode, ranks)
        self.advance = GraphedStep(self._work, self.device, enabled=train.cuda_graph == "auto", agree=ranks.agree)
        self.schedule = StallHalving(train.lr * train.scale, train.lr_floor * train.scale)
        self.health = HealthMonitor()
        self.done, self.images, self.seconds = 0, 0, 0.0  # totals over all sittings
        self._saved_step = -1
        self._waited = 0.0  # seconds for batches, since the last row of metrics
        self._row: tuple[Reading, dict[str, Any]] | None = None  # of metrics, on its way from the device
        self._settling = _SETTLED + 1  # steps until all that compiles has compiled, but for what draws sheets
        self._drawn = False
        self._heard: Reading | None = None  # whether a rank wanted to stop in the step before
        self._writer = Writer()
        if ranks.watch is not None:
            ranks.watch.last_wish = lambda: self._writer.linger(_LINGER)
        if stored is not None:
            self._resume(state, stored)
        self.step.adopt_kernels()
        self._tensorboard: Any = None
        if ranks.first:
            make_folder(out)
            self.folder.write_config(config)  # not before all that could refuse to continue has agreed
            make_folder(self.folder.samples)  # after it: what holds this alone is no run
            self._fixed = self._sheet_inputs()
            if events is not None:
                self._tensorboard = events(str(out / "tensorboard"), purge_step=self.done + 1)
        size = f"{config.model.size} px, {count_parameters(generator, discriminator):,} parameters (D + G)"
        many = "" if ranks.alone else f"; {ranks.world} ranks of {train.batch_size // ranks.world} images a step"
        display.say(f"device     {device_line}; {precision}{many}")
        display.say(f"networks   {config.preset}: {size}; {train.updates} updates, {train.latents} z")
        graph_line = "the whole step one CUDA graph" if self.advance.enabled else "no CUDA graph"
        display.say(f"step       {self.step.describe()}; {compile_line}; {graph_line}")
        display.say(f"data       {data_line}")
        display.say(f"run        {out}" + (f", continued at step {self.done:,}" if self.done else ""))

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
            self._writer.check()
            self._settle()
            last = self._is_last(stop)  # decided once: a signal may come at any line below
            if train.lr_window and self.done % train.lr_window == 0:
                self.step.set_lr(self.schedule.update(equilibrium.read_window()))
            sheet_due = last or self.done % train.sample_every == 0 or self.done == train.log_every
            checkpoint_due = last or self.done % train.checkpoint_every == 0
            log_due = last or self.done % train.log_every == 0
            waits = sheet_due or checkpoint_due  # for the device
            finite = self._log(wait=log_due or waits)
            if not finite or (waits and self.step.found_bad.item()):
                return self._stop_not_finite()
            spread = self._sheet() if sheet_due and self.ranks.first else None
            if log_due:
                self._begin_row(spread)
            else:
                self.display.step(self.fraction(), self.done, self._seconds_left())
            if not self._log(wait=waits):
                return self._stop_not_finite()
            if checkpoint_due:
                before = time.monotonic()
                self._checkpoint()
                self._row_clock += time.monotonic() - before  # as for a sheet
        self.advance.close()
        self.ranks.leave()
        if self.ranks.first:
            self._finish()
        if stop.signal == signal.SIGINT:
            return STOPPED_BY_USER
        return 0 if self.fraction() >= 1 else train.requeue_code

    def _is_last(self, stop: StopRequest) -> bool:
        """Whether a total is reached or somebody asked to stop; all ranks answer alike."""
        wish = stop.signal is not None or self.fraction() >= 1
        if self.ranks.alone:
            return wish
        self.step.wish.fill_(wish)  # goes with the next step
        heard, self._heard = self._heard, Reading(self.step.wished[None])
        # clocks differ between ranks, counts do not
        return self._fraction(None) >= 1 or (heard is not None and heard.values()[0] > 0)

    def _settle(self) -> None:
        """In the first steps of several ranks: all take the kernels that the first one found fastest."""
        self._settling -= 1
        if self._settling == _SETTLED and not self.ranks.alone:
            self.step.adopt_kernels()
            self.ranks.require_equal(self.step.fingerprint, f"step {self.done:,}", self.folder.path)
        elif self._settling == 0:
            self.ranks.settle()

    def advance_one(self) -> None:
        """One step, on the batch that is next."""
        begin = time.monotonic()
        self.ranks.begin_step(self.done + 1)
        self.loader.prepare(self.images)
        self._waited += time.monotonic() - begin
        self.advance()
        self.done, self.images = self.done + 1, self.images + self.config.train.batch_size

    def fraction(self) -> float:
        """How much of the run is done, by the total that is nearest."""
        return self._fraction(self.config.train.minutes)

    def _fraction(self, minutes: float | None) -> float:
        train = self.config.train
        shares = ((self.images, train.images), (self.done, train.steps), (self.seconds / 60, minutes))
        return max((now / total for now, total in shares if total is not None), default=0.0)

    def _work(self) -> None:
        """One step from its counter alone: the batch and the latents are those of the images seen so far."""
        train, width = self.config.train, self.config.model.latent
        position = self.step.number * train.batch_size
        count = train.batch_size // self.ranks.world
        mine = position + self.ranks.rank * count
        z_d = z_g = latents(train.seed, Z_D, mine, count, width, self.device)
        if train.latents == "independent":
            z_g = latents(train.seed, Z_G, mine, count, width, self.device)
        self.step(self.loader.current(position), z_d, z_g)

    def _seconds_left(self) -> float:
        return max(0.0, self.seconds / max(self.fraction(), 1e-9) - self.seconds)

    def _begin_row(self, spread: float | None) -> None:
        """Send a row of metrics on its way from the device; `spread` is the diversity of a sheet of this step."""
        facts = {"step": self.done, "images": self.images, "lr": self.schedule.lr}
        self._row = self.step.begin_reading(), facts | ({} if spread is None else {"diversity": spread})

    def _log(self, *, wait: bool) -> bool:
        """Write the row that is on its way wherever rows go, if it is here or `wait`; False if it is not finite."""
        # several ranks look at the same step, not whenever it has arrived
        if self._row is None or not (wait or (self.ranks.alone and self._row[0].arrived())):
            return True
        (reading, facts), self._row = self._row, None
        *taken, found_bad = reading.values()
        if found_bad or not self.ranks.first:
            return not found_bad
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
        self.display.training(self.fraction(), row, self._seconds_left())
        return True

    def _sheet_inputs(self) -> tuple[torch.Tensor, torch.Tensor]:
        train, count = self.config.train, COLUMNS * ROWS
        ids, _ = self.loader.order.place(torch.arange(count))
        fixed = normalize_images(self.loader.pixels(ids).to(self.device), margin=2 * train.jitter)
        return fixed, sheet_latents(self.config.model.latent, train.seed, count, self.device)

    def _sheet(self) -> float:
        """Write a sample sheet; returns the diversity of its generated images."""
        before = time.monotonic()
        if not self._drawn:
            self.ranks.settle(False)  # kernels are chosen for it
        sheet, fake = training_sheet(self.step.average, self.step.discriminator, *self._fixed)
        save_png(self.folder.sheet_file(self.done), sheet)
        spread = diversity(fake)
        self._warn(self.health.after_sheet(spread, self.images, self.fraction()), self.done)
        self._row_clock += time.monotonic() - before  # images per second are those of training
        self._drawn = True
        self.ranks.settle(self._settling <= 0)
        return spread

    def _checkpoint(self) -> None:
        if self._saved_step == self.done:
            return
        self.ranks.require_equal(self.step.fingerprint, f"step {self.done:,}", self.folder.path)
        self._saved_step = self.done
        if not self.ranks.first:
            return
        state = {
            "step": self.done,
            "images": self.images,
            "seconds": self.seconds,
            "data": self.data,
            "schedule": self.schedule.state_dict(),
            "asked_lr": self.config.train.lr,
            "kernels": tuning.choices(self.device, lasting=True),
            **self.step.training_state(),
        }
        state, step = copied(state), self.done

        def write() -> None:
            self.folder.write_weights(state["modules"])
            save_checkpoint(self.folder.checkpoints, step, state, self.config.train.keep)
            self.folder.nonfinite_file.unlink(missing_ok=True)  # got over

        if self._writer.busy:
            self.display.say(f"warning: step {step:,}: the checkpoint before is still being written; waiting for it")
            self.ranks.settle(False)  # slow storage is no reason to end the run
        self._writer.begin(write)
        self.ranks.settle(self._settling <= 0)

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

    def _resume(self, state: dict[str, Any] | None, stored: RunConfig) -> None:
        if state is not None:
            self._load(state, stored)
        if not self.ranks.first:
            return
        self.folder.rewind(self.done)
        for row in self.folder.read_metrics():
            self.health.after_log(row["k"])
            if "diversity" in row:
                self.health.after_sheet(row["diversity"], seen := row["images"], self.fraction() * seen / self.images)

    def _load(self, state: dict[str, Any], stored: RunConfig) -> None:
        if not same_images(state.get("data") or {"crc32": state["data_crc32"]}, self.data):
            raise UserError(
                f"data {self.config.train.data!r} is not what {self.folder.path} was trained on so far (other pixels); "
                "restore it, or give another --out"
            )
        self.step.load_training_state(state)
        self.schedule.load_state_dict(state["schedule"])
        # not config.json's, where the checkpoint knows: a kill may have come between the two
        if state.get("asked_lr", stored.train.lr) != self.config.train.lr:
            self.schedule.lr = self.config.train.lr * self.config.train.scale
        self.step.set_lr(self.schedule.lr)
        self.done, self.images, self.seconds = state["step"], state["images"], state["seconds"]
        self._saved_step = self.done

    def _warn(self, message: str | None, step: int) -> None:
        if message:
            self.display.say(f"warning: step {step:,}: {message}")

    def _stop_not_finite(self) -> int:
        """Say where a number stopped being finite; the weights are those of the step before."""
        step = int(self.step.bad_step.item())
        self.advance.close()
        if self.ranks.first:
            self.ranks.settle(False)  # slow storage is no reason to end the run
            self._writer.finish()  # it would take the dump away
            self._dump(step)
        self.ranks.gather(None)  # torchrun kills who is left, once one has ended
        return NOT_FINITE

    def _dump(self, step: int) -> None:
        count = self.config.train.batch_size
        ids = self.loader.order.place(torch.arange((step - 1) * count, step * count))[0].tolist()
        k = self.step.equilibrium.k.item()
        dump = {"step": step, "image_ids": ids, "k": k if k == k else "nan", "config": self.config.to_dict()}
        write_json(self.folder.nonfinite_file, dump)
        lr, alternating = self.schedule.lr / self.config.train.scale, self.config.train.updates == "alternating"
        message = not_finite(step, self.folder.nonfinite_file, self.folder.path, lr, alternating=alternating)
        self.display.say(message)

    def _finish(self) -> None:
        """Curves and animation, and where everything is."""
        if self._tensorboard is not None:
            self._tensorboard.close()
        self._writer.finish()
        if not self.folder.generator_file.exists():
            self.folder.write_weights(self.step.state_dict())
        rows = self.folder.read_metrics()
        model = self.config.model
        title = f"{self.config.preset}: {model.size} px, n = {model.filters}, gamma {self.config.train.gamma:g}"
        save_curves(self.folder.curves_file, rows, title)
        save_animation(self.folder.animation_file, sorted(self.folder.samples.glob("*.png")))
        finished = self.fraction() >= 1
        self.display.say(f"{'done' if finished else 'stopped'} after {self.done:,} steps, {self.images:,} images")
        for line in self.folder.contents(self.done):
            self.display.say(f"  {line}")
        next_command = f"more faces: fastbegan sample {self.folder.path}"
        self.display.say(next_command if finished else f"to continue: fastbegan train --out {self.folder.path}")


def train(config: RunConfig, out: Path | None, *, resume: bool = True) -> int:
    """Train by `config` in the run folder `out`; returns the exit code. Raises UserError for bad input.

    Started by torchrun, this is one of several ranks; all use rank 0's config and folder. Without `out` a new folder is
    made, which ranks that are started again could not find: they need one. A rank's process ends here.
    """
    ranks = Ranks.join(config.train.rank_timeout)
    # until the end: torchrun's SIGTERM must not come before a name
    with StopRequest(echoes=ranks.launched, ranks=not ranks.alone) as stop:
        try:
            if not ranks.alone and out is None:
                raise UserError("--out is missing; several ranks need it, so that a restart finds the run")
            config = ranks.from_first(config)
            folder = new_run_folder(config.preset) if out is None else out
            with Display(quiet=not ranks.first) as display:
                training = Training(config, folder, resume=resume, display=display, ranks=ranks)
                with contextlib.closing(training.loader):
                    code = training.run(stop)
            ranks.leave()
        except BaseException as error:
            if ranks.alone:
                raise
            stop.ignore()
            code = ranks.end_by(error)
        return code if ranks.alone else ranks.exit(code)
