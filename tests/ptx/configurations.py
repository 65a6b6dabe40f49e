"""What there is to execute: all configurations of the gate, the registered checks, and forms the gate does not have."""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbegan_kernels import problems
from tests.helpers import cross_compile

from . import project
from .elementwise import elementwise, singles
from .launch import Device
from .layers import gate_layers, variants
from .record import hash_of, normalized

_CPU = torch.device("cpu")
_CHECKED = ("float32", "bfloat16", "float16")


class Problem(Protocol):
    """A layer or a check of `fastbegan_kernels.problems`, or one of this package."""

    @property
    def name(self) -> str: ...

    @property
    def dtype(self) -> Any: ...

    def results(self, form: Any, device: torch.device) -> list[Tensor]:
        """What a form computes."""
        ...

    def expected(self, device: torch.device) -> tuple[list[Tensor], list[Tensor]]:
        """Plain results in this dtype, and in float64."""
        ...


@dataclass(frozen=True)
class Configuration:
    """Problems that are run in a form; with a case of the gate, they must compile its very PTX."""

    name: str
    problems: tuple[Problem, ...]
    form: Any
    case: cross_compile.Case | None = None

    @property
    def work(self) -> float:
        """About how long it takes, to begin with the longest."""
        layers = [problem for problem in self.problems if isinstance(problem, project.Layer)]
        return sum(
            layer.x[0] * layer.x[2] * layer.x[3] * layer.weight[0] * layer.weight[1] * layer.weight[2] ** 2
            for layer in layers
        )


@dataclass
class Outcome:
    """What came of a configuration."""

    name: str
    ptx: str  # the hash
    excess: float = 0.0
    faults: list[str] = field(default_factory=list)
    notes: dict[str, int] = field(default_factory=dict)
    ctas: int = 0
    executed: int = 0
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Right results, and nothing reported."""
        return not self.faults and self.excess <= 1

    def __str__(self) -> str:
        notes = "".join(f" | {count} x {kind}" for kind, count in self.notes.items())
        head = f"{self.name} | {'ok' if self.ok else 'BAD'} | {self.ctas} CTAs | excess {self.excess:.2f}"
        return "\n".join([f"{head} | {self.seconds:.1f} s{notes}", *(f"    {fault}" for fault in self.faults)])


@functools.lru_cache(maxsize=4)
def configurations(capability: int) -> tuple[Configuration, ...]:
    """All of an architecture that the machine can run.

    Before sm_80 there are no matrix products. On sm_100 there are those in float32: tensor memory is not implemented.
    """
    return tuple(one for one in _configurations(capability) if capability < 100 or not _on_tensor_cores(one))


def _on_tensor_cores(configuration: Configuration) -> bool:
    layers = (problem for problem in configuration.problems if isinstance(problem, project.Layer))
    return configuration.form != project.EPILOGUE and any(layer.dtype != "float32" or layer.tf32 for layer in layers)


def _configurations(capability: int) -> Iterator[Configuration]:
    for case in cross_compile.cases(capability):
        matrix = project.matrix_case(case[0])
        if matrix is None:
            problem, form = elementwise(case[0])
            yield Configuration(case[0], (problem,), form, case)
        else:
            yield Configuration(case[0], tuple(gate_layers(matrix)), project.form_of(matrix.tile), case)
    for op in problems.POINTWISE:
        for dtype in _CHECKED if op != "equilibrium_update" else _CHECKED[:1]:
            yield Configuration(f"check {op} {dtype}", (problems.Pointwise(op, dtype),), project.FUSED)
    for name, problem in singles():
        yield Configuration(f"single {name}", (problem,), project.FUSED)
    if capability < 80:
        return
    for name, layer, tile in variants():
        yield Configuration(f"variant {name}", (layer,), project.form_of(tile))


def gate_ptx(case: cross_compile.Case, capability: int) -> str:
    """What the gate compiles."""
    _, kernel, given, constants, options, by_16 = case
    signature = {name: "constexpr" if name in constants else given[name] for name in kernel.arg_names}
    attributes = {
        (i,): [["tt.divisibility", 16]]
        for i, name in enumerate(signature)
        if signature[name].startswith("*") or name in by_16
    }
    fixed = {(list(signature).index(name),): value for name, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options).asm["ptx"]


def ptx_hash(configuration: Configuration, capability: int) -> str:
    """Without running it."""
    if configuration.case is not None:
        return hash_of([gate_ptx(configuration.case, capability)])
    device = Device(capability, compile_only=True)
    for problem in configuration.problems:
        _results(device, problem, configuration.form)
    return hash_of(launch.ptx for launch in device.launches)


def _results(device: Device, problem: Problem, form: Any) -> list[Tensor]:
    cudnn = torch.backends.cudnn
    before, cudnn.allow_tf32 = cudnn.allow_tf32, getattr(problem, "tf32", False)
    try:
        with device.installed():
            return problem.results(form, _CPU)
    finally:
        cudnn.allow_tf32 = before


def largest_excess(problem: Problem, got: Sequence[Tensor]) -> float:
    """By the project's rule: at most 1."""
    plain, exact = problem.expected(_CPU)
    tf32 = getattr(problem, "tf32", False)
    return max(problems.excess(*three, tf32=tf32) for three in zip(got, plain, exact, strict=True))


def run(configuration: Configuration, capability: int, device: Device | None = None) -> Outcome:
    """Execute a configuration, on a device of its own or on the one that is given."""
    begun = time.monotonic()
    device = Device(capability) if device is None else device
    outcome = Outcome(configuration.name, "")
    for problem in configuration.problems:
        got = _results(device, problem, configuration.form)
        outcome.excess = max(outcome.excess, largest_excess(problem, got))
    texts = [launch.ptx for launch in device.launches]
    outcome.ptx = hash_of(texts)
    if configuration.case is not None:
        outcome.ptx = hash_of([gate := gate_ptx(configuration.case, capability)])
        compiled = [text for text in texts if normalized(text) == normalized(gate)]
        matrix = project.matrix_case(configuration.name) is not None
        if not compiled or (matrix and len(compiled) < len(texts)):
            outcome.faults.append("the launch compiled other PTX than the gate")
    for launch in device.launches:
        outcome.ctas, outcome.executed = outcome.ctas + launch.ctas, outcome.executed + launch.executed
        if launch.report.errors:
            outcome.faults += str(launch.report).splitlines()
        for kind, count in launch.report.kinds().items():
            outcome.notes[kind] = outcome.notes.get(kind, 0) + count
    outcome.seconds = time.monotonic() - begun
    return outcome
