"""`python tests/helpers/soak.py FOLDER STEPS`: train; print memory and compiled graphs of each quarter of the steps."""

from __future__ import annotations

import ctypes
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path

from torch._dynamo.utils import counters

from fastbegan import PRESETS, ModelConfig
from fastbegan.display import Display
from fastbegan.distributed.stop import StopRequest
from fastbegan.runs.folder import RunConfig
from fastbegan.training.loop import Training


def _kib() -> int:
    gc.collect()
    if sys.platform == "linux":  # what glibc holds back of freed memory comes and goes by 2 MiB
        ctypes.CDLL(None).malloc_trim(0)
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS:"))


def main(folder: Path, steps: int) -> None:
    train = replace(
        PRESETS["demo"].train,
        data="faces:64",
        images=None,
        steps=steps,
        batch_size=8,
        device="cpu",
        log_every=10,
        sample_every=100,
        checkpoint_every=50,
        compile="default",
        precision="float32",
    )
    with Display(quiet=True) as display:
        config = RunConfig("demo", ModelConfig(size=32, filters=4), train)
        training = Training(config, folder, resume=True, display=display)
        found: list[dict[str, int]] = []
        step = training.advance_one

        def advance_one() -> None:
            step()
            if training.progress.done % (steps // 4) == 0:
                stats = counters["stats"]
                graphs, breaks = stats["unique_graphs"], sum(counters["graph_break"].values())
                found.append({"step": training.progress.done, "kib": _kib(), "graphs": graphs, "breaks": breaks})

        training.advance_one = advance_one  # type: ignore[method-assign]
        assert training.run(StopRequest()) == 0
    print(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
