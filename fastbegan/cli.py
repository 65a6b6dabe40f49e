"""The command line: what is typed becomes one of `commands`, what goes wrong one line."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import os
import re
import shlex
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any

import tyro
from tyro.conf import subcommand

from fastbegan_kernels import dispatch
from fastbegan_kernels.faults import is_out_of_memory

from .commands.bench_plan import BenchPlan
from .commands.bench_record import BenchRecord
from .commands.bench_report import BenchReport
from .commands.bench_step import BenchStep
from .commands.data import DataCheck, DataInfo, DataPack
from .commands.doctor import Doctor
from .commands.evaluate import Evaluate
from .commands.experiment import Experiment
from .commands.explore import Explore
from .commands.export import Export
from .commands.info import Info
from .commands.sample import Sample
from .commands.train import Train
from .config import PRESETS
from .data import arrays
from .errors import UserError
from .files import printable
from .runs.folder import RunFolder, settings_of

_AT_HOME = re.compile(rf"((?:--[\w-]+=)?(?:(?:{'|'.join(arrays.NAMES)}):)?)(~.*)", re.DOTALL)


def _expanded(argument: str) -> str:
    """`argument` with the home folder for its `~`, of which a shell leaves those within a word: --out=~/run.

    It has to be done before a Path is made, to which `./~` and `~` are the same.
    """
    found = _AT_HOME.fullmatch(argument)
    return argument if found is None else found[1] + os.path.expanduser(found[2])  # noqa: PTH111


def _train_defaults(arguments: list[str]) -> Train:
    """What the options of `train` default to: the run in --out if it holds one, else the preset, or another run's."""
    if arguments[:1] != ["train"]:
        return Train(PRESETS["demo"].model, PRESETS["demo"].train)
    scan = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, kind in (("--preset", str), ("--out", Path), ("--size", str)):
        scan.add_argument(name, type=kind, nargs="?")  # that a value is missing is for the real parser to say
    scan.add_argument("--widths", nargs="*")
    known = scan.parse_known_args(arguments)[0]
    start = settings_of(known.preset or "demo")
    if known.out is not None and RunFolder(known.out).exists():
        start = RunFolder(known.out).read_config()
    model, train = start.model, start.train
    with contextlib.suppress(ValueError):  # what is no number is for the real parser to name
        if known.size is not None and int(known.size) != model.size:  # another size has other standard widths
            widths = None if known.widths is None else tuple(int(width) for width in known.widths)
            model = dataclasses.replace(model, size=int(known.size), widths=widths)
    if any(argument.partition("=")[0] in ("--images", "--steps", "--minutes") for argument in arguments):
        # a length that is asked for replaces the one of the preset or the stored run
        train = dataclasses.replace(train, images=None, steps=None, minutes=None)
    return Train(model, train, preset=start.preset)


def _check_environment() -> None:
    try:
        dispatch.asked_for(None)
    except ValueError as error:
        raise UserError(str(error)) from None


def _require_no_stray_images(unknown: list[str]) -> None:
    """Raises UserError where images are given to `train` without --data."""
    if not any(argument.startswith("-") for argument in unknown):
        images = unknown[0] if len(unknown) == 1 else "FOLDER"
        raise UserError(
            f"{', '.join(map(repr, unknown))} stands alone; accepted for images: --data {shlex.quote(images)}"
        )


def _parse(arguments: list[str]) -> Any:
    bench = (
        Annotated[BenchStep, subcommand("step")]
        | Annotated[BenchReport, subcommand("report")]
        | Annotated[BenchPlan, subcommand("plan")]
        | Annotated[BenchRecord, subcommand("record")]
    )
    data = (
        Annotated[DataPack, subcommand("pack")]
        | Annotated[DataCheck, subcommand("check")]
        | Annotated[DataInfo, subcommand("info")]
    )
    commands = (
        Annotated[Train, subcommand("train", default=_train_defaults(arguments))]
        | Annotated[Sample, subcommand("sample")]
        | Annotated[Evaluate, subcommand("evaluate")]
        | Annotated[Explore, subcommand("explore")]
        | Annotated[Experiment, subcommand("experiment")]
        | Annotated[Export, subcommand("export")]
        | Annotated[Info, subcommand("info")]
        | Annotated[Doctor, subcommand("doctor")]
        | Annotated[data, subcommand("data", description="Pack images, check them, look into a pack.")]  # pyright: ignore
        | Annotated[bench, subcommand("bench", description="Measure, and read what was measured.")]  # pyright: ignore
    )
    about = "BEGAN: train it, draw with it. --version prints the version."
    parse = functools.partial(tyro.cli, commands, prog="fastbegan", description=about, args=arguments)
    if arguments[:1] == ["train"]:
        command, unknown = parse(return_unknown_args=True)
        if not unknown:
            return command
        _require_no_stray_images(unknown)
    return parse()  # names what it does not know, and ends the process


def main(arguments: list[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 2 for bad input, others as `train` says.

    Raises BrokenPipeError where the reader of the output has left.
    """
    arguments = [_expanded(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    speaks = os.environ.get("RANK", "0") == "0"  # of several ranks, one says what all see
    command = None
    try:
        with warnings.catch_warnings():
            warnings.showwarning = _show_warning if speaks else _ignore_warning
            with contextlib.ExitStack() as stack:
                if not speaks:
                    for redirect in (contextlib.redirect_stdout, contextlib.redirect_stderr):
                        stack.enter_context(redirect(io.StringIO()))
                _check_environment()
                command = _parse(arguments)
            return command.run()
    except BrokenPipeError:
        raise  # the reader of the output has left: no bad input
    except (UserError, OSError) as error:
        if speaks or command is not None:
            print(f"error: {printable(str(error))}", file=sys.stderr)
        return 2
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        print(f"error: {_first_line(error)}{_less_memory(command)}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        with contextlib.suppress(OSError):
            print("interrupted", file=sys.stderr)
        return 130


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0] or "out of memory"


def _less_memory(command: object) -> str:
    if not isinstance(command, Train):
        return ""
    return (
        "; less is needed with --recompute, with --accumulate PARTS, or with a smaller --batch-size in a new --out; "
        f"what fits: fastbegan doctor --preset {command.preset}"
    )


def _ignore_warning(*_: object, **__: object) -> None:
    pass


def _show_warning(message: Warning | str, *_: object, **__: object) -> None:
    with contextlib.suppress(OSError):  # that nobody can read it is no reason to end
        print(f"warning: {printable(str(message))}", file=sys.stderr)
