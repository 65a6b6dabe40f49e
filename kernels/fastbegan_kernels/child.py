"""The parent's side of `trial`: one long-lived child for all problems, another one where it died."""

from __future__ import annotations

import atexit
import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from .problems import Layer, Pointwise

SECONDS = 120.0  # in which a child has to answer: longer, it hangs
FIELD = "\t"  # between the fields of an answer
VARIABLE = "FASTBEGAN_TRIAL"  # "inside": no child; "child" in the environment of one
# what a kernel can bring upon its process; SIGKILL and the like come from outside
_CRASHES = {getattr(signal, name, None) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE")}


class NoChildError(Exception):
    """No child could be started that gets as far as the device; the message is its last word."""


@dataclass(frozen=True)
class Trial:
    """What became of one form: `fault` is None where it ran. `lasting`: another try would end the same."""

    fault: str | None
    lasting: bool = True


class Child:
    """One process of `trial`."""

    def __init__(self) -> None:
        self._words = tempfile.TemporaryFile("w+b")  # noqa: SIM115  # its standard error, as long as it lives
        environment = {name: value for name, value in os.environ.items() if name != "FASTBEGAN_IMPL"}
        packages = str(Path(__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
        environment[VARIABLE] = "child"
        try:
            self.process = subprocess.Popen(
                command(), env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._words,
                encoding="utf-8", errors="replace", start_new_session=True,  # Ctrl-C at a terminal is not for it
            )  # fmt: skip
        except OSError:
            self._words.close()
            raise
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def send(self, task: str) -> bool:
        """Whether it took the task; not where it has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(task + "\n")
            self.process.stdin.flush()
        except OSError:
            return False
        return self.process.poll() is None

    def answer(self) -> list[str] | None:
        """The fields of the next line, None where it died. Raises queue.Empty where it does not answer in time."""
        line = self._lines.get(timeout=SECONDS)
        return None if line is None else line.split(FIELD)

    def close(self) -> None:
        """End it, now."""
        self.process.kill()
        self.process.wait()
        self._listener.join()  # it reads to the end, which has come
        for pipe in (self.process.stdin, self.process.stdout, self._words):
            with contextlib.suppress(OSError):  # what was not written to a child that had ended
                if pipe is not None:
                    pipe.close()

    def last_word(self) -> str:
        """The last line it wrote to standard error, or how it ended."""
        code = self.process.wait()
        self._words.seek(0)
        lines = self._words.read().decode(errors="replace").strip().splitlines()
        named = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]  # others are advice
        return (named or lines or [f"it ended with code {code}"])[-1].strip()[:200]

    def death(self) -> Trial:
        """What its end says of the form that it had begun."""
        code = self.process.wait()
        if -code in _CRASHES:
            return Trial(f"killed its process ({signal.Signals(-code).name})")
        return Trial(f"ended its process ({self.last_word()})", lasting=False)


def command() -> list[str]:
    """What starts a child."""
    return [sys.executable, "-m", "fastbegan_kernels.trial"]


_running: dict[int, Child] = {}  # by process, since a fork has no child of its own


@atexit.register
def close() -> None:
    """End the child, if there is one."""
    if (child := _running.pop(os.getpid(), None)) is not None:
        child.close()


def tried(
    problem: Layer | Pointwise, device: object, hows: Sequence[str], on_each: Callable[[], None] | None = None
) -> dict[str, Trial]:
    """What became of each form in a child; `on_each` is called as they come. Raises NoChildError."""
    try:
        return _tried(problem, device, hows, on_each or (lambda: None))
    except BaseException:
        close()  # what it still answers would be taken for the next problem's
        raise


def _tried(
    problem: Layer | Pointwise, device: object, hows: Sequence[str], on_each: Callable[[], None]
) -> dict[str, Trial]:  # fmt: skip
    found: dict[str, Trial] = {}
    fresh = os.getpid() not in _running
    while waiting := [how for how in hows if how not in found]:
        try:
            child = _running.get(os.getpid()) or _running.setdefault(os.getpid(), Child())
        except OSError as error:
            raise NoChildError(f"{type(error).__name__}: {error}") from None
        task = {"type": type(problem).__name__, "problem": asdict(problem), "hows": waiting, "device": str(device)}
        before, begun = len(found), None
        try:
            answer = child.answer() if child.send(json.dumps(task)) else None
            while answer is not None and answer[0] != "done":
                word, *rest = answer
                if word == "unable":
                    close()
                    raise NoChildError(rest[0])
                if word == "begin":
                    begun = rest[0]
                elif word in ("ran", "broken", "failed", "starved"):  # whatever else is printed is no answer
                    found[rest[0]], begun = _verdict(word, rest[1:]), None
                    on_each()
                answer = child.answer()
        except queue.Empty:
            close()
            if begun is None:
                raise NoChildError(f"it did not answer within {SECONDS:g} seconds") from None
            found[begun] = Trial(f"took longer than {SECONDS:g} seconds", lasting=False)
            on_each()
            continue
        if answer is None:
            word, death = child.last_word(), child.death()
            close()
            if begun is not None:
                found[begun] = death
                on_each()
            elif len(found) == before:
                if fresh and not found:
                    raise NoChildError(word)
                if fresh:
                    break  # what was found counts; the rest stays unknown
                fresh = True  # the one of before had ended by itself; a new one has to get further
    return found


def _verdict(word: str, reason: list[str]) -> Trial:
    if word == "ran":
        return Trial(None)
    text = f"had not enough memory ({reason[0]})" if word == "starved" else f"failed ({reason[0]})"
    return Trial(text, lasting=word == "broken")
