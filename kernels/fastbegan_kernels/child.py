"""Starts the process that runs `trial`, talks to it, and replaces it where it died. One process serves all problems."""

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
from dataclasses import dataclass
from pathlib import Path

from .problems import Form, Problem

SECONDS = 120.0  # a child that does not answer for so long hangs
FIELD = "\t"  # between the fields of an answer
VARIABLE = "FASTBEGAN_TRIAL"  # "inside": no child; "child" in the environment of a child
# signals that a kernel can cause; SIGKILL and the like come from outside
_CRASHES = {getattr(signal, name, None) for name in ("SIGSEGV", "SIGABRT", "SIGBUS", "SIGILL", "SIGFPE")}


class NoChildError(Exception):
    """No child reached the device; the message is the last line that it wrote."""


@dataclass(frozen=True)
class Trial:
    """The verdict on one form. `fault` is None where it ran; `lasting` means that another try would end the same."""

    fault: str | None
    lasting: bool = True


class Child:
    """One process of `trial`."""

    def __init__(self) -> None:
        self._errors = tempfile.TemporaryFile("w+b")  # noqa: SIM115  # its standard error, as long as it lives
        environment = {name: value for name, value in os.environ.items() if name != "FASTBEGAN_IMPL"}
        packages = str(Path(__file__).parent.parent)
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (packages, os.environ.get("PYTHONPATH"))))
        environment[VARIABLE] = "child"
        try:
            self.process = subprocess.Popen(
                command(),
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._errors,
                encoding="utf-8",
                errors="replace",
                start_new_session=True,  # Ctrl-C at a terminal must not reach it
            )
        except OSError:
            self._errors.close()
            raise
        self._lines: queue.Queue[str | None] = queue.Queue()
        # pipes have no timeout, so a thread reads and `answer` waits on the queue
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def send(self, task: str) -> bool:
        """Write a task; False where the child has ended."""
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(task + "\n")
            self.process.stdin.flush()
        except OSError:
            return False
        return self.process.poll() is None

    def answer(self) -> list[str] | None:
        """The fields of the next line, None where the child died. Raises queue.Empty after SECONDS."""
        line = self._lines.get(timeout=SECONDS)
        return None if line is None else line.split(FIELD)

    def close(self) -> None:
        """Kill the child and release its pipes."""
        self.process.kill()
        self.process.wait()
        self._listener.join()  # its pipe is at its end
        for pipe in (self.process.stdin, self.process.stdout, self._errors):
            with contextlib.suppress(OSError):  # unwritten input of a child that had ended
                if pipe is not None:
                    pipe.close()

    def last_word(self) -> str:
        """The last error line on standard error, else its last line, else the exit code."""
        code = self.process.wait()
        self._errors.seek(0)
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        errors = [line for line in lines if re.match(r"[\w.]+(Error|Exception|Interrupt)\b", line)]  # no advice
        return (errors or lines or [f"it ended with code {code}"])[-1].strip()[:200]

    def death(self) -> Trial:
        """The verdict on the form that was running when the child died."""
        code = self.process.wait()
        if -code in _CRASHES:
            return Trial(f"killed its process ({signal.Signals(-code).name})")
        return Trial(f"ended its process ({self.last_word()})", lasting=False)


def command() -> list[str]:
    """The command line of a child."""
    return [sys.executable, "-m", "fastbegan_kernels.trial"]


_running: dict[int, Child] = {}  # by this process's id: a fork must not use its parent's child


@atexit.register
def close() -> None:
    """End the child of this process, if there is one."""
    if (child := _running.pop(os.getpid(), None)) is not None:
        child.close()


def tried(
    problem: Problem, device: object, forms: Sequence[Form], on_each: Callable[[], None] | None = None
) -> dict[Form, Trial]:
    """Verdicts by form from a child; `on_each` is called at each verdict. Raises NoChildError."""
    try:
        trials = _tried(problem, device, [form.name for form in forms], on_each or (lambda: None))
        return {form: trials[form.name] for form in forms if form.name in trials}
    except BaseException:
        close()  # the next problem would read the answers still to come
        raise


def _tried(problem: Problem, device: object, forms: Sequence[str], on_each: Callable[[], None]) -> dict[str, Trial]:
    trials: dict[str, Trial] = {}
    fresh = os.getpid() not in _running
    # each round sends all forms without a verdict; a child that dies or hangs decides one of them, so this ends
    while waiting := [form for form in forms if form not in trials]:
        try:
            child = _running.get(os.getpid()) or _running.setdefault(os.getpid(), Child())
        except OSError as error:
            raise NoChildError(f"{type(error).__name__}: {error}") from None
        task = {
            "type": type(problem).__name__,
            "problem": vars(problem),
            "forms": waiting,
            "device": str(device),
        }
        decided, begun = len(trials), None
        try:
            answer = child.answer() if child.send(json.dumps(task)) else None
            while answer is not None and answer[0] != "done":
                word, *rest = answer
                if word == "unable":
                    close()
                    raise NoChildError(rest[0])
                if word == "begin":
                    begun = rest[0]
                elif word in ("ran", "broken", "failed", "starved"):  # other lines are no answers
                    trials[rest[0]], begun = _verdict(word, rest[1:]), None
                    on_each()
                answer = child.answer()
        except queue.Empty:
            close()
            if begun is None:
                raise NoChildError(f"it did not answer within {SECONDS:g} seconds") from None
            trials[begun] = Trial(f"took longer than {SECONDS:g} seconds", lasting=False)
            on_each()
            continue
        if answer is None:
            last_word, death = child.last_word(), child.death()
            close()
            if begun is not None:
                trials[begun] = death
                on_each()
            elif len(trials) == decided:
                if fresh and not trials:
                    raise NoChildError(last_word)
                if fresh:
                    break  # the verdicts so far count; the other forms stay unknown
                fresh = True  # an idle child had ended by itself; the next one is new and must get further
    return trials


def _verdict(word: str, reason: list[str]) -> Trial:
    if word == "ran":
        return Trial(None)
    text = f"had not enough memory ({reason[0]})" if word == "starved" else f"failed ({reason[0]})"
    return Trial(text, lasting=word == "broken")
