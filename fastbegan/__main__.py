"""The door, for `fastbegan` and `python -m fastbegan`: what has to hold before torch is there and at the end."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from typing import NoReturn

from .version import __version__

CLOSED_PIPE = 141  # exit code where the reader of the output has left: that of a program which SIGPIPE ends


def main() -> int:
    """Run the command that this process was given; returns the exit code: that of `cli.main`, or CLOSED_PIPE."""
    try:
        return _command(sys.argv[1:])
    except BrokenPipeError:
        return CLOSED_PIPE
    except SystemExit as end:
        if isinstance(end.__context__, BrokenPipeError):  # rich makes this of it
            return CLOSED_PIPE
        raise
    finally:
        _flush()


def _flush() -> None:
    """Write what the output holds back: Python itself would do so at its end, and print a trace where it cannot."""
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # takes it
        if isinstance(error, BrokenPipeError):
            sys.exit(CLOSED_PIPE)
        with contextlib.suppress(OSError):
            print(f"error: the output cannot be written ({error.strerror})", file=sys.stderr)
        sys.exit(2)


def _command(arguments: list[str]) -> int:
    if arguments[:1] == ["--version"]:
        print(f"fastbegan {__version__}")
        return 0
    heeds = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # a shell's background jobs ignore it
    if heeds:
        signal.signal(signal.SIGINT, _leave)  # an exception could be caught, or turned into another, by what imports
    from . import cli  # torch comes with it, and takes seconds

    try:
        if heeds:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        return cli.main(arguments)
    except KeyboardInterrupt:  # before or after what `cli.main` guards
        _leave()
    finally:
        if heeds:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # while Python ends, it would print traces


def _leave(*_: object) -> NoReturn:
    with contextlib.suppress(OSError):
        if os.environ.get("RANK", "0") == "0":  # of several ranks, one says what all see
            os.write(2, b"interrupted\n")
    os._exit(130)


if __name__ == "__main__":
    raise SystemExit(main())
