"""A stand-in for Triton's launch: the project's own launchers run on CPU tensors, and their kernels in the machine.

Kernels are the attributes of the modules of `fastbegan_kernels.fused` that end with `_kernel`. Arguments are bound and
specialised by Triton's own code, and compiled for a GPU that need not be there. The machine works on copies of their
memory. What a launcher got from `torch.empty` counts as uninitialised, and its kernel must fill it.
"""

from __future__ import annotations

import bisect
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import triton
from torch import Tensor
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from . import project
from .global_memory import GlobalMemory, Region
from .machine import Program, execute
from .parse import parse
from .report import Report
from .tensor_copies import SPANS, TensorMap

_NUMBERS = {"i1": np.int8, "i32": np.int32, "i64": np.int64, "u64": np.uint64, "fp32": np.float32, "fp64": np.float64}
_SCRATCH = 2  # pointers that Triton adds to every kernel's parameters


@dataclass
class Launch:
    """One launch of a kernel."""

    kernel: str
    ptx: str
    report: Report
    ctas: int = 0
    executed: int = 0


@functools.lru_cache(maxsize=8)
def program_of(ptx: str) -> Program:
    """Parsed and decoded."""
    return Program(parse(ptx))


class Device:
    """A GPU of a capability (80, 90, ...) that is not there."""

    def __init__(
        self,
        capability: int,
        *,
        change: Callable[[str], str] = lambda ptx: ptx,
        replaced: Mapping[str, JITFunction] | None = None,
        compile_only: bool = False,
    ) -> None:
        """`change` edits PTX before it runs, and `replaced` kernels take the place of those of their name."""
        self.target = GPUTarget("cuda", capability, 32)
        self.change, self.replaced, self.compile_only = change, replaced or {}, compile_only
        self.launches: list[Launch] = []
        self.allocations = _Allocations()
        self.asked: dict[int, Tensor] = {}  # tensors by their address, of those whose address somebody wanted

    @contextmanager
    def installed(self) -> Iterator[Device]:
        """While this lasts, launchers start their kernels here."""
        with ExitStack() as stack:
            for module in project.modules():
                for name, kernel in project.kernels(module).items():
                    stack.enter_context(patch.object(module, name, _Kernel(self, self.replaced.get(name, kernel))))
                if vars(module).get("torch") is torch:
                    stack.enter_context(patch.object(module, "torch", _Torch(self.allocations)))
            stack.enter_context(patch.object(*project.refusal(), lambda *arguments: None))
            stack.enter_context(_Addresses(self.asked))
            yield self

    def compile(self, kernel: JITFunction, arguments: Sequence[Any], settings: Mapping[str, Any]) -> _Bound:
        """As Triton's launcher: its constants and specialisations."""
        backend = make_backend(self.target)
        binder = create_function_from_signature(kernel.signature, kernel.params, backend)
        values, specialization, options = binder(*arguments, **settings)
        options, signature, constants, attributes = kernel._pack_args(
            backend, dict(settings), values, specialization, options
        )
        attributes = {path: found for path, found in attributes.items() if found}  # as the gate: one key of the cache
        source = ASTSource(kernel, signature, constants, attributes)
        return _Bound(values, signature, triton.compile(source, target=self.target, options=options.__dict__))

    def launch(
        self, kernel: JITFunction, grid: Sequence[int], arguments: Sequence[Any], settings: Mapping[str, Any]
    ) -> None:
        """Compile a kernel for these arguments and run it."""
        bound = self.compile(kernel, arguments, settings)
        report = Report(forgiven=project.forgiven(kernel.__name__))
        launch = Launch(kernel.__name__, self.change(bound.compiled.asm["ptx"]), report, ctas=int(np.prod(grid)))
        self.launches.append(launch)
        memory = _Memory(self, bound, project.IN_PLACE.get(kernel.__name__, ()))
        if self.compile_only:
            memory.fill_with_zeros()
            return
        program = program_of(launch.ptx)
        parameters, maps = bound.pack(program, memory)
        launch.executed = execute(
            program,
            memory.machine,
            grid,
            parameters,
            bound.compiled.metadata.shared,
            launch.report,
            tensor_maps=maps,
        )
        missing = memory.write_back()
        if missing:
            launch.report.add("global not written", 0, kernel.__name__, missing, "bytes of a result")


@dataclass
class _Bound:
    """Values of all parameters by name, their types, and the kernel that was compiled for them."""

    values: Mapping[str, Any]
    signature: Mapping[str, str]
    compiled: Any

    @property
    def given(self) -> dict[str, tuple[str, Any]]:
        """Type and value of what is passed at run time."""
        return {name: (kind, self.values[name]) for name, kind in self.signature.items() if kind != "constexpr"}

    def tensors(self) -> dict[str, Tensor]:
        """Of pointers and descriptors."""
        found = {name: getattr(value, "base", value) for name, (_, value) in self.given.items()}
        return {name: value for name, value in found.items() if isinstance(value, Tensor)}

    def pack(self, program: Program, memory: _Memory) -> tuple[list[bytes], dict[int, TensorMap]]:
        """The bytes of each parameter; and tensor maps by the number of their parameter, from 1."""
        descriptions = iter(self.compiled.metadata.tensordesc_meta or [])
        found: list[bytes] = []
        maps: dict[int, TensorMap] = {}
        for kind, value in self.given.values():
            if kind.startswith("tensordesc"):  # the map, sizes, strides
                description = next(descriptions)
                tensor_map = TensorMap(
                    base=memory.address(value.base.data_ptr()),
                    shape=tuple(value.shape),
                    strides=tuple(value.strides),
                    box=tuple(description["block_size"]),
                    size=description["elem_size"],
                    span=SPANS[description["swizzle"]],
                )
                tensor_map.check()
                found.append(bytes(128))
                maps[len(found)] = tensor_map
                found += [np.int32(n).tobytes() for n in value.shape] + [np.int64(n).tobytes() for n in value.strides]
            elif kind.startswith("*"):
                found.append(np.uint64(memory.address(value.data_ptr())).tobytes())
            else:
                found.append(_NUMBERS[kind](value).tobytes())
        found += [bytes(8)] * _SCRATCH
        expected = [size for size, _ in program.kernel.parameters.values()]
        assert [len(one) for one in found] == expected, (self.signature, expected)
        return found, maps


class _Kernel:
    """Takes the place of a kernel in its module."""

    def __init__(self, device: Device, kernel: JITFunction) -> None:
        self.device, self.kernel = device, kernel

    def __getitem__(self, grid: Sequence[int]) -> Callable[..., None]:
        return lambda *arguments, **settings: self.device.launch(self.kernel, grid, arguments, settings)


class _Torch:
    """torch, except that what it allocates is remembered."""

    def __init__(self, allocations: _Allocations) -> None:
        self._allocations = allocations

    def __getattr__(self, name: str) -> Any:
        value = getattr(torch, name)
        if name not in ("empty", "empty_like"):
            return value
        return lambda *arguments, **options: self._allocations.add(value(*arguments, **options))


class _Addresses(TorchFunctionMode):
    """Remembers tensors whose address is asked for: kernels find addresses in tables, not only in their arguments."""

    def __init__(self, asked: dict[int, Tensor]) -> None:
        super().__init__()
        self.asked = asked

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is Tensor.data_ptr:
            self.asked[result] = args[0]
        return result


def _extent(x: Tensor) -> tuple[int, int]:
    """The addresses of its first byte and behind its last."""
    values = 1 + sum((size - 1) * stride for size, stride in zip(x.shape, x.stride(), strict=True)) if x.numel() else 0
    return x.data_ptr(), x.data_ptr() + values * x.element_size()


def _bytes(x: Tensor, start: int, end: int) -> np.ndarray:
    """The memory between two addresses, which lies in the storage of `x`."""
    storage = x.untyped_storage()
    flat = torch.empty(0, dtype=torch.uint8).set_(storage, start - storage.data_ptr(), (end - start,), (1,))
    return flat.numpy()


class _Allocations:
    """What launchers got from torch.empty, and which of its bytes a kernel has written since.

    Tensors are kept, so that nothing else can take their memory.
    """

    def __init__(self) -> None:
        self.found: list[tuple[int, int, Tensor, np.ndarray]] = []

    def add(self, x: Tensor) -> Tensor:
        start, end = _extent(x)
        self.found.append((start, end, x, np.zeros(end - start, bool)))
        return x

    def parts(self, start: int, end: int) -> Iterator[tuple[slice, np.ndarray]]:
        """What lies between two addresses: where, counted from the first, and the written bytes (a view)."""
        for low, high, _, written in self.found:
            first, last = max(start, low), min(end, high)
            if first < last:
                yield slice(first - start, last - start), written[first - low : last - low]


class _Memory:
    """The memory of a launch: every tensor a region of its own, but for those that overlap."""

    def __init__(self, device: Device, bound: _Bound, in_place: Sequence[str]) -> None:
        self.device, tensors = device, bound.tensors()
        tables = [x for x in tensors.values() if x.dtype == torch.int64]
        pointed = [device.asked[v] for x in tables for v in np.unique(x.numpy()).tolist() if v in device.asked]
        self.starts: list[int] = []
        self.parts: list[np.ndarray] = []  # of the tensors' own memory
        end = 0
        for tensor in sorted((x for x in (*tensors.values(), *pointed) if x.numel()), key=lambda x: x.data_ptr()):
            first, last = _extent(tensor)
            if first >= end:
                self.starts.append(first)
                self.parts.append(_bytes(tensor, first, last))
            elif last > end:
                self.parts[-1] = _bytes(tensor, self.starts[-1], last)
            end = max(end, last)
        self.changed = [_extent(tensors[name]) for name in in_place if name in tensors]
        self.machine = GlobalMemory([self._region(n) for n in range(len(self.parts))])
        for table in tables:
            self._translate(table)

    def _region(self, number: int) -> Region:
        start, part = self.starts[number], self.parts[number]
        known, writable = np.ones(len(part), bool), np.zeros(len(part), bool)
        for where, written in self.device.allocations.parts(start, start + len(part)):
            known[where] = written
            writable[where] = ~written
        for first, last in self.changed:
            if start <= first < start + len(part):
                writable[first - start : last - start] = True
        return Region(part, known, writable, start % 64)

    def _translate(self, table: Tensor) -> None:
        """Addresses of tensors become those of the machine."""
        number = self._number(table.data_ptr())
        data, _ = self.machine.result(number)
        at = table.data_ptr() - self.starts[number]
        values = data[at : at + 8 * table.numel()].view(np.int64)
        for n, value in enumerate(values.tolist()):
            if value in self.device.asked:
                values[n] = self.address(value)

    def _number(self, address: int) -> int:
        return bisect.bisect_right(self.starts, address) - 1

    def address(self, address: int) -> int:
        """Where the machine has what is at an address of this process."""
        number = self._number(address)
        return self.machine.address(number) + address - self.starts[number]

    def write_back(self) -> int:
        """Take over what was written. Returns how many bytes of the launchers' new memory were not."""
        missing = 0
        for number, (start, part) in enumerate(zip(self.starts, self.parts, strict=True)):
            data, known = self.machine.result(number)
            region = self.machine.regions[number]
            part[region.writable] = data[region.writable]
            for where, written in self.device.allocations.parts(start, start + len(part)):
                written[:] = known[where]
                missing += int((~known[where]).sum())
        return missing

    def fill_with_zeros(self) -> None:
        """In place of a run: launchers go on with numbers."""
        for start, part in zip(self.starts, self.parts, strict=True):
            for where, written in self.device.allocations.parts(start, start + len(part)):
                part[where] = np.where(written, part[where], 0)
                written[:] = True
