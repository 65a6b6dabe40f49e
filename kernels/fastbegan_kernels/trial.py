"""The child process that runs new kernels first, since a bad kernel can kill its process.

It reads one task a line from standard input, as JSON, and answers in lines of tab-separated fields:

- `ready`: the device works; or `unable REASON`.
- `begin FORM`, then one of
  - `ran FORM`;
  - `broken FORM REASON`: another try would end the same;
  - `failed FORM REASON`: another try might succeed;
  - `starved FORM REASON`: memory ran out.
- `done`, after the last form of a task.

The process ends with its parent, after a minute without a task, and after an error that broke the device.
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
from .problems import PROBLEMS

_IDLE = 60.0  # seconds; an idle child holds device memory


def trial(task: dict[str, Any], say: Callable[..., None]) -> None:
    """Run each form of a problem on the inputs of its check; `say` reports before and after each."""
    device = torch.device(task["device"])
    fields = {name: tuple(value) if isinstance(value, list) else value for name, value in task["problem"].items()}
    problem = PROBLEMS[task["type"]](**fields)
    torch.backends.cudnn.allow_tf32 = problem.tf32
    try:
        torch.ones(8, device=device).sum().item()
    except Exception as error:
        say("unable", in_short(error))
        raise
    say("ready")
    for form in task["forms"]:
        say("begin", form)
        try:
            for value in problem.results(problem.form_named(form), device):
                value.float().sum().item()  # waits for the device
        except Exception as error:
            lost = is_cuda_error(error) or not _answers(device)
            word = "broken" if lost or is_of_the_kernel(error) else "starved" if is_out_of_memory(error) else "failed"
            say(word, form, in_short(error))
            if lost:
                raise  # without a context all later forms would fail too, and be blamed
        else:
            say("ran", form)
    say("done")


def _answers(device: torch.device) -> bool:
    """Whether the device still works."""
    try:
        return device.type != "cuda" or torch.cuda.synchronize(device) is None
    except Exception:
        return False


def main() -> None:
    """Answer task after task."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # output of kernels and compilers must not mix with the answers
    tasks: queue.Queue[str] = queue.Queue()

    def read() -> None:
        for line in sys.stdin:
            tasks.put(line)
        os._exit(0)  # the parent closed the pipe: stop even in the middle of a kernel

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
