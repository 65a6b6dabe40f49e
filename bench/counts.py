"""Costs of a step that do not depend on a clock: operations, launches, compiled graphs; and shares of its time."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from fastbegan.config import ModelConfig, TrainConfig
from fastbegan.measure.machine import synchronize
from fastbegan.measure.step import configured, inputs
from fastbegan.nets.models import build
from fastbegan.training import objective
from fastbegan.training.step import TrainStep

ROOT = Path(__file__).resolve().parent.parent
_NAMED = 9  # operations or kernels with a share of their own


class OperationCount(TorchDispatchMode):
    """Counts operations that compute or copy, by name; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.name().partition("::")[2].partition(".")[0]
        free = func.is_view or name in ("new_empty", "promote_types")
        if func.namespace in ("aten", "fastbegan") and not free:
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Kernels that `work` launches on a GPU, by the profiler; on a CPU the operations that it dispatches."""
    if device.type != "cuda":
        with OperationCount() as count:
            work()
        return {"operations": count.calls.total()}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize(device)
    return {"kernels": sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA")}


def breakdown(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Shares of the time of `work`, by kernel on a GPU and by operation on a CPU; small ones together."""
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        work()
        synchronize(device)
    shares: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")[:40]
        if "CompiledFxGraph" in name:  # one for each graph, by its hash
            name = "compiled loops"
        shares[name] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(shares.values())
    largest = {name: time / total for name, time in shares.most_common(_NAMED)}
    return largest | {"the rest": 1 - sum(largest.values())}


def graphs(px: int, filters: int, batch: int, mode: str) -> dict[str, int]:
    """Of a step under torch.compile: graphs, graph breaks, and graphs compiled after the second step.

    Counted in another process, so that this one compiles nothing twice.
    """
    command = [sys.executable, "-m", "bench.counts", str(px), str(filters), str(batch), mode]
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True, text=True)
    return json.loads(done.stdout.splitlines()[-1])


def _graphs(model: ModelConfig, train: TrainConfig) -> dict[str, int]:
    compiled: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        compiled.append(graph)
        return graph

    real, z = inputs(model, train, torch.device("cpu"))
    with mock.patch.object(objective, "_compiled", lambda net, *_: torch.compile(net, dynamic=False, backend=keep)):
        step = TrainStep(*build(model, seed=0), train, None, "default")
        for _ in range(2):
            step(real, z, z)
        first = len(compiled)
        for _ in range(3):
            step(real.flip(0).contiguous(memory_format=torch.channels_last), -z, z)
    return {"graphs": first, "graph breaks": sum(counters["graph_break"].values()), "recompiles": len(compiled) - first}


if __name__ == "__main__":
    size, width, count = map(int, sys.argv[1:4])
    settings = configured(TrainConfig(batch_size=count), sys.argv[4])
    print(json.dumps(_graphs(ModelConfig(size=size, filters=width), settings)))
