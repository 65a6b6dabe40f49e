"""What a step costs that no clock is needed for: operations, launches, compiled graphs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from unittest import mock

import torch
from torch import Tensor
from torch._dynamo.utils import counters
from torch.utils._python_dispatch import TorchDispatchMode

from fastbegan import objective
from fastbegan.bench.machine import synchronize
from fastbegan.config import ModelConfig, TrainConfig
from fastbegan.models import build
from fastbegan.step import TrainStep

_NAMED = 9  # operations or kernels with a share of their own


class OperationCount(TorchDispatchMode):
    """Counts operations that compute or copy; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        nothing = ("new_empty", "promote_types")
        if (
            func.namespace in ("aten", "fastbegan")
            and not func.is_view
            and not any(name in str(func) for name in nothing)
        ):
            self.found[func.__name__.partition(".")[0]] += 1
        return func(*args, **(kwargs or {}))


def launches(work: Callable[[], object], device: torch.device) -> dict[str, int]:
    """Kernels that `work` starts on a GPU by the profiler; on a CPU the operations it dispatches."""
    if device.type != "cuda":
        with OperationCount() as count:
            work()
        return {"operations": sum(count.found.values())}
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profiler:
        work()
        torch.cuda.synchronize(device)
    return {"kernels": sum(event.count for event in profiler.key_averages() if event.device_type.name == "CUDA")}


def breakdown(work: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Shares of the time that `work` takes, by kernel on a GPU and by operation on a CPU; the rest in one."""
    gpu = device.type == "cuda"
    activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
    with torch.profiler.profile(activities=[activity]) as profiler:
        work()
        synchronize(device)
    shares: Counter[str] = Counter()
    for event in profiler.key_averages():
        name = event.key.removeprefix("aten::")[:48]
        shares[name] += event.self_device_time_total if gpu else event.self_cpu_time_total
    total = sum(shares.values())
    found = {name: time / total for name, time in shares.most_common(_NAMED)}
    return found | {"the rest": 1 - sum(found.values())}


def graphs(model: ModelConfig, train: TrainConfig, real: Tensor, z: Tensor) -> dict[str, int]:
    """Of the step under torch.compile: graphs, places where one had to be broken, and graphs made after two steps."""
    made: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        made.append(graph)
        return graph

    torch.compiler.reset()
    counters.clear()
    with mock.patch.object(objective, "_compiled", lambda net, mode: torch.compile(net, dynamic=False, backend=keep)):
        step = TrainStep(*build(model, seed=0, device=real.device), train, None, "default")
        for _ in range(2):
            step(real, z, z)
        first = len(made)
        for _ in range(3):
            step(real.flip(0).contiguous(memory_format=torch.channels_last), -z, z)
    breaks = sum(counters["graph_break"].values())
    torch.compiler.reset()
    return {"graphs": first, "graph breaks": breaks, "recompiles": len(made) - first}
