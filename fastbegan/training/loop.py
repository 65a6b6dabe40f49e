"""The training loop: images -> step -> metrics, sheets and checkpoints in the run folder."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import signal
from collections.abc import Callable
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch

from fastbegan_kernels import tuning

from ..config import TrainConfig
from ..counter import Z_D, Z_G, latents
from ..data.choose import open_loader, same_images
from ..data.source import absolute
from ..display import Display
from ..distributed.flight import write_record
from ..distributed.ranks import Ranks
from ..distributed.stop import STOPPED_BY_USER, StopRequest
from ..distributed.watch import LOST
from ..errors import UserError
from ..files import make_folder, write_json
from ..nets.models import build, count_parameters
from ..runs.checkpoint import load_for_all
from ..runs.curves import save_curves
from ..runs.folder import RunConfig, RunFolder, check_resumable, new_run_folder
from ..runs.sheets import save_animation
from .checkpoints import Checkpoints
from .graph import GraphedStep
from .health import not_finite
from .loggers import Open, prepare
from .metrics import Metrics
from .place import choose, find_device
from .profiling import Profile, named, steps_before_graph
from .progress import Progress
from .schedule import StallHalving, falling
from .sheets import Sheets
from .step import TrainStep
from .tune import tune_for_all

# exit code; 0: the run ended by itself or the system asked it to; 4 (watch.LOST) and 5 are of several ranks
NOT_FINITE = 3
_SETTLED = 5  # steps after which everything that compiles has compiled, sheets apart


class Training:
    """One run, from its config to its folder: `run` trains; `begin` and `go_on` do so step by step."""

    def __init__(
        self,
        config: RunConfig,
        out: Path,
        *,
        resume: bool,
        display: Display,
        ranks: Ranks | None = None,
        profile: int = 0,
    ) -> None:
        """Open or create the run folder; load images, nets and the newest checkpoint. Raises UserError.

        Nothing keeps another process out of the folder; `train` does. Only the first of several ranks touches it; the
        others take what they need from that one.
        """
        self.ranks = ranks = ranks or Ranks()
        config.train.require_runnable(ranks.world, launched=ranks.launched)
        loggers = [prepare(name) for name in config.train.loggers] if ranks.first else []
        device, device_line = find_device(config.train, ranks)
        self.display, self.folder = display, RunFolder(out)
        # a continued run keeps the images, wherever it is continued
        self.config = _with(config, data=absolute(config.train.data))
        stored = ranks.from_first(self._stored(resume) if ranks.first else None)
        train = _as_it_began(self.config, stored).train
        self.loader, data_lines, self.data = open_loader(
            train, config.model.size, device, display.preparing, rank=ranks.rank, world=ranks.world
        )
        ranks.require_same("data", self.data, same_images)
        state = None if stored is None else load_for_all(self.folder.checkpoints, device, ranks)
        if state is not None:  # the kernels of the run so far, not those that are fastest today
            tuning.adopt(device, state.get("kernels", {}))
        self.place = place = choose(config.model, train, device, ranks, _compiled_so_far(state, stored, train))
        train = place.train
        self.config = config = dataclasses.replace(config, train=train)
        tune_for_all(config.model, train, device, place.dtype, ranks, display.trying)
        nets = build(config.model, seed=train.seed, device=device)
        self.step = TrainStep(*nets, train, place.dtype, place.compile_mode, ranks)
        self.profile = Profile(profile if ranks.first else 0, _SETTLED, out / "profile", device, display.say)
        self.advance = GraphedStep(
            self._work,
            device,
            enabled=train.cuda_graph == "auto",
            agree=ranks.agree,
            after=steps_before_graph(profile, _SETTLED),
        )
        self.schedule = StallHalving(train.lr * train.scale, train.lr_floor * train.scale)
        self._lr_set = self.schedule.lr
        self.progress = Progress(train, self.step, ranks)
        self.metrics = Metrics(self.step, self.folder, display, ranks)
        self.checkpoints = Checkpoints(self.step, self.folder, display, ranks, keep=train.keep)
        self._steps_here = 0
        if state is not None and stored is not None:
            self._load(state, stored)
        self.step.adopt_kernels()
        self.sheets = Sheets(train, self.step, self.loader, self.folder, ranks)
        if ranks.first:
            self._open_folder(loggers)
        self._tell(device_line, data_lines, count_parameters(*nets))

    def run(self, stop: StopRequest) -> int:
        """Train until a total is reached or someone asks to stop; returns the exit code."""
        self.begin()
        stop.patient = True
        while not self.progress.last:
            if not self.go_on(stop):
                return self._stop_not_finite()
        return self._end(stop)

    def begin(self) -> None:
        """Start the clocks: this process trains from now on."""
        self.metrics.begin(self.progress)
        self.progress.begin()
        self.profile.begin()

    def go_on(self, stop: StopRequest) -> bool:
        """One step, and what is due after it; False where a number is not finite."""
        self.advance_one()
        self.progress.decide(stop)
        self._move_lr_if_due()
        if not self.metrics.catch_up(self.progress):
            return False
        with self.metrics.paused():
            looks = self.sheets.draw_if_due(self.progress)
        if not self.metrics.log(self.progress, self._lr_set, looks):
            return False
        with self.metrics.paused():
            self.checkpoints.save_if_due(self.progress, self.state)
        return True

    def advance_one(self) -> None:
        """One step, on the batch that is next."""
        with self.metrics.waiting():
            self.ranks.begin_step(self.progress.done + 1)
            self.loader.prepare(self.progress.images)
        self.advance()
        self.progress.count()
        if self.profile.ends:
            with self.ranks.patient(), self.metrics.paused():
                self.profile.write()
        self.profile.step()
        self.checkpoints.check()
        self._settle()

    def _work(self) -> None:
        """The work of one step, from its number alone: batch and latents follow from the images seen so far."""
        train, width = self.config.train, self.config.model.latent
        position = self.step.number * train.batch_size
        count = train.batch_size // self.ranks.world
        first = position + self.ranks.rank * count
        z_d = z_g = latents(train.seed, Z_D, first, count, width, self.place.device)
        if train.latents == "independent":
            z_g = latents(train.seed, Z_G, first, count, width, self.place.device)
        with named("images"):
            images = self.loader.current(position)
        self.step(images, z_d, z_g)

    def _settle(self) -> None:
        """In the first steps of several ranks: all take the kernels that the first rank found fastest."""
        self._steps_here += 1
        if self._steps_here == 1 and not self.ranks.alone:
            self.step.adopt_kernels()
            self.ranks.require_equal(self.step.fingerprint, f"step {self.progress.done:,}", self.folder.path)
        elif self._steps_here == _SETTLED:
            self.ranks.settle()

    def _move_lr_if_due(self) -> None:
        window = self.config.train.lr_window
        if window and self.progress.done % window == 0:
            self.schedule.update(self.step.equilibrium.read_window())
        if (lr := self._lr()) != self._lr_set:
            self._set_lr(lr)

    def _lr(self) -> float:
        """The learning rate of the next step."""
        train = self.config.train
        # clocks differ between ranks
        fraction = self.progress.fraction() if self.ranks.alone else self.progress.counted_fraction()
        return falling(self.schedule.lr, train.lr_floor * train.scale, train.lr_fall, fraction)

    def _set_lr(self, lr: float) -> None:
        self._lr_set = lr
        self.step.set_lr(lr)

    def _end(self, stop: StopRequest) -> int:
        """After the last step; returns the exit code."""
        self.profile.close()
        self.advance.close()
        self.ranks.leave()
        if self.ranks.first:
            self._finish()
        if stop.signal == signal.SIGINT:
            return STOPPED_BY_USER
        return 0 if self.progress.fraction() >= 1 else self.config.train.requeue_code

    def state(self) -> dict[str, Any]:
        """A checkpoint: everything that the rest of the run depends on."""
        return {
            **self.progress.state(),
            "data": self.data,
            "schedule": self.schedule.state_dict(),
            "asked_lr": self.config.train.lr,
            "kernels": tuning.choices(self.place.device, lasting=True),
            "compile": self.place.compile_mode or "off",
            **self.step.training_state(),
        }

    def _load(self, state: dict[str, Any], stored: RunConfig) -> None:
        if not same_images(state.get("data") or {"crc32": state["data_crc32"]}, self.data):
            raise UserError(
                f"data {self.config.train.data!r} is not what {self.folder.path} was trained on so far (other pixels "
                f"than {stored.train.data!r} had); restore it, or give another --out"
            )
        self.step.load_training_state(state)
        self.schedule.load_state_dict(state["schedule"])
        # the rate of the checkpoint: a process may die after config.json is written, before the next checkpoint
        if state.get("asked_lr", stored.train.lr) != self.config.train.lr:
            self.schedule.lr = self.config.train.lr * self.config.train.scale
        self.progress.load_state(state)
        self._set_lr(self._lr())
        self.checkpoints.saved_step = self.progress.done

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
        check_resumable(stored, _as_it_began(self.config, stored), self.folder.path)
        return stored

    def _open_folder(self, loggers: list[Open]) -> None:
        """Make the folder this run's, once everything but a logger that could refuse to continue has agreed."""
        make_folder(self.folder.path)
        self.folder.rewind(self.progress.done)
        self.folder.write_config(self.config)
        make_folder(self.folder.samples)  # after the config: a folder with samples alone holds no run
        done = self.progress.done
        self.metrics.open(self.progress, [start(self.folder.path, self.config, done) for start in loggers])

    def _tell(self, device_line: str, data_lines: tuple[str, ...], parameters: int) -> None:
        """The first lines of a run."""
        say, train, place = self.display.say, self.config.train, self.place
        count = train.batch_size // self.ranks.world
        many = "" if self.ranks.alone else f"; {self.ranks.world} ranks of {count} images a step"
        size = f"{self.config.model.size} px, {parameters:,} parameters (D + G)"
        graph_line = "the whole step one CUDA graph" if self.advance.enabled else "no CUDA graph"
        done = self.progress.done
        say(f"device     {device_line}; {train.precision}{many}")
        say(f"networks   {self.config.preset}: {size}; {train.updates} updates, {train.latents} z")
        say(f"step       {self.step.describe()}; {place.compile_line}; {graph_line}")
        if place.measured_line:
            say(f"measured   {place.measured_line}")
        for name, line in zip_longest(("data",), data_lines, fillvalue=""):
            say(f"{name:<11}{line}")
        say(f"run        {self.folder.path}" + (f", continued at step {done:,}" if done else ""))
        if place.compile_mode is not None and self.progress.fraction() < 1:
            say("compiling  the first step may take a minute or more")

    def _stop_not_finite(self) -> int:
        """Say where a number stopped being finite; the weights are those of the step before."""
        step = int(self.step.bad_step.item())
        self.profile.close()
        self.advance.close()
        if self.ranks.first:
            self.checkpoints.finish()  # before the dump, which a checkpoint removes
            with self.ranks.patient():  # slow storage is no reason to end without a word
                self._dump(step)
                self.metrics.close(failed=True)
        self.ranks.gather(None)  # torchrun kills the other ranks, once one has ended
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
        self.checkpoints.finish()
        if not self.folder.generator_file.exists():
            self.folder.write_weights(self.step.state_dict())
        model, progress, say = self.config.model, self.progress, self.display.say
        title = f"{self.config.preset}: {model.size} px, n = {model.filters}, gamma {self.config.train.gamma:g}"
        save_curves(self.folder.curves_file, self.folder.read_metrics(), title)
        save_animation(self.folder.animation_file, sorted(self.folder.samples.glob("*.png")))
        finished = progress.fraction() >= 1
        say(f"{'done' if finished else 'stopped'} after {progress.done:,} steps, {progress.images:,} images")
        for line in self.folder.contents(progress.done):
            say(f"  {line}")
        next_command = f"more faces: fastbegan sample {self.folder.path}"
        say(next_command if finished else f"to continue: fastbegan train --out {self.folder.path}")
        self.metrics.close()  # last: wandb may upload for long


def _with(config: RunConfig, **changes: Any) -> RunConfig:
    """The same run with other settings of its training."""
    return dataclasses.replace(config, train=dataclasses.replace(config.train, **changes))


def _as_it_began(config: RunConfig, stored: RunConfig | None) -> RunConfig:
    """Where a run that goes on leaves precision or passes open, it keeps those of `stored`, wherever it goes on."""
    if stored is None:
        return config
    names = [name for name in ("precision", "passes") if getattr(config.train, name) == "auto"]
    return _with(config, **{name: getattr(stored.train, name) for name in names})


def _compiled_so_far(state: dict[str, Any] | None, stored: RunConfig | None, train: TrainConfig) -> str | None:
    """The mode of torch.compile that a run has had, or "off"; None for a new run, and where its length changes."""
    if state is None or stored is None:
        return None
    same = all(getattr(stored.train, name) == getattr(train, name) for name in ("images", "steps", "minutes"))
    return state.get("compile") if same else None


def _last_wish(folder: Path, rank: int, free: Callable[[], object], code: int) -> None:
    """What a rank does before its process ends with `code`, in whatever thread."""
    free()
    if code == LOST:
        write_record(folder / "flight-recorder", rank)


def train(config: RunConfig, out: Path | None, *, resume: bool = True, profile: int = 0) -> int:
    """Train by `config` in the run folder `out`; returns the exit code. Raises UserError for bad input.

    `profile` is the number of steps of which the first rank writes a trace.

    Started by torchrun, this is one of several ranks; all use rank 0's config and folder. Without `out` a new folder is
    made, which ranks that are started again could not find: they need one. A rank's process ends here. No other process
    may train in the folder until then.
    """
    ranks = Ranks.join(config.train.rank_timeout)
    # until the end: torchrun's SIGTERM must not come before a name
    with StopRequest(echoes=ranks.launched, ranks=not ranks.alone) as stop:
        with contextlib.ExitStack() as reserved:
            try:
                if not ranks.alone and out is None:
                    raise UserError("--out is missing; several ranks need it, so that a restart finds the run")
                config, profile = ranks.from_first((config, profile))
                folder = reserved.enter_context(new_run_folder(config.preset)) if out is None else out
                if ranks.first:
                    reserved.enter_context(RunFolder(folder).reserved())
                if ranks.watch is not None:
                    ranks.watch.last_wish = functools.partial(_last_wish, folder, ranks.rank, reserved.close)
                with Display(quiet=not ranks.first) as display:
                    training = Training(config, folder, resume=resume, display=display, ranks=ranks, profile=profile)
                    reserved.callback(training.checkpoints.linger)  # which writes in the folder
                    with contextlib.closing(training.loader):
                        try:
                            code = training.run(stop)
                        except BaseException:
                            with ranks.patient():  # wandb may upload for long, and the error is still to be told
                                training.metrics.close(failed=True)
                            raise
                ranks.leave()
            except BaseException as error:
                if ranks.alone:
                    raise
                stop.ignore()
                code = ranks.end_by(error)
        return code if ranks.alone else ranks.exit(code)
