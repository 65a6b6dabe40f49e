"""The child process in which kernels that were never run on this kind of machine are tried: they may kill it.

It reads tasks from standard input, a JSON object a line, and answers in lines: "ready" once the device does what it is
told, or "unable REASON"; "begin HOW", then "ran HOW" or "broken HOW REASON", where another try would end the same,
"failed HOW REASON", where it might not, "starved HOW REASON" for want of memory; "done" after each task. It ends with
its parent, after a minute without a task, and after an error that broke the device.
"""

from __future__ import annotations

import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

import torch

from .child import FIELD
from .faults import in_short, is_cuda_error, is_of_the_kernel, is_out_of_memory
from .problems import Layer, Pointwise

_IDLE = 60.0  # seconds; its context holds memory of the device


def trial(task: dict[str, Any], say: Callable[..., None]) -> None:
    """Run each form of a problem on the inputs of a check, and say before and after that it did."""
    device = torch.device(task["device"])
    kind = {"Layer": Layer, "Pointwise": Pointwise}[task["type"]]
    problem = kind(**{name: tuple(v) if isinstance(v, list) else v for name, v in task["problem"].items()})
    if isinstance(problem, Layer):
        torch.backends.cudnn.allow_tf32 = problem.tf32
    try:
        torch.ones(8, device=device).sum().item()
    except Exception as error:
        say("unable", in_short(error))
        raise
    say("ready")
    for how in task["hows"]:
        say("begin", how)
        try:
            for value in problem.results(how, device):
                value.float().sum().item()  # waits for the device
        except Exception as error:
            lost = is_cuda_error(error) or not _answers(device)
            word = "broken" if lost or is_of_the_kernel(error) else "starved" if is_out_of_memory(error) else "failed"
            say(word, how, in_short(error))
            if lost:
                raise  # the context is gone: what comes next would fail too, and is not to blame
        else:
            say("ran", how)
    say("done")


def _answers(device: torch.device) -> bool:
    """Whether the device still does what it is told."""
    try:
        return device.type != "cuda" or torch.cuda.synchronize(device) is None
    except Exception:
        return False


def main() -> None:
    """Answer task after task."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # whatever kernels and compilers print is no answer
    tasks: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            tasks.put(line)
        os._exit(0)  # the parent is gone, or needs no more, whatever a kernel is doing

    def say(*fields: str) -> None:
        print(*fields, sep=FIELD, file=answers, flush=True)

    threading.Thread(target=read, daemon=True).start()
    while True:
        try:
            task = tasks.get(timeout=_IDLE)
        except queue.Empty:
            os._exit(0)
        trial(json.loads(task), say)


if __name__ == "__main__":
    main()
