"""What every operation goes through: which card it runs on, what may not be mixed, who waits, what a graph records."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import Tensor
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode

from .captures import capture_on
from .devices import DEVICES, THREAD, index_of, require_code
from .findings import FINDINGS, NOTE
from .generators import device_of
from .graphs import Node, flat
from .memory import MEMORY, card_of, is_host
from .mixing import require_one_card
from .streams import Stream, current_stream
from .transfers import copy_into, moved
from .waiting import wait_if_needed

_RANDOM = frozenset(
    "uniform_ normal_ rand randn randint randperm bernoulli bernoulli_ random_ multinomial native_dropout rand_like "
    "randn_like randint_like exponential_".split()
)


def _function_of(name: str) -> Callable[..., Any] | None:
    """The Python function of a custom operation."""
    if (definition := OPDEFS.get(name)) is not None:
        return definition._init_fn
    ours = sys.modules.get("fastbegan_kernels.library_op")
    return None if ours is None else ours.FUNCTIONS.get(name)


class PretendedMode(TorchDispatchMode):
    """Sees all operations of a thread, below autograd."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, _, name = func._schema.name.partition("::")
        if (function := _function_of(func._schema.name)) is not None:
            with self:  # what it is made of goes through here one by one
                return function(*args, **kwargs)
        tensors = flat(kwargs, flat(args))
        wanted = None if kwargs.get("device") is None else torch.device(kwargs["device"])
        if not all(map(is_host, tensors)) or (wanted is not None and wanted.type not in ("cpu", "cuda")):
            return func(*args, **kwargs)  # meta, fake and the like
        return _Operation(func, namespace, name, args, dict(kwargs), tensors).run(wanted, sys._getframe(1))


class _Operation:
    """One call of an operation whose tensors all lie in the CPU's memory."""

    def __init__(
        self, func: Any, namespace: str, name: str, args: Any, kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> None:
        self.func, self.namespace, self.name = func, namespace, name
        self.args, self.kwargs, self.tensors = args, kwargs, tensors
        self.cards = [card_of(tensor) for tensor in tensors]

    def run(self, wanted: torch.device | None, caller: FrameType) -> Any:
        here = next((card for card in self.cards if card is not None), None)
        target = self._target(wanted, here, caller)
        if self.tensors:
            THREAD.last = here
        pinned = bool(self.kwargs.pop("pin_memory", False))
        if here is None and target is None:
            found = self.func(*self.args, **self._on_cpu())
            if pinned:
                for tensor in flat(found):
                    MEMORY.add(tensor, None, None)
            return found
        if self.name == "copy_" and self.cards[0] != self.cards[1]:
            return self._copy()
        if self.name == "_to_copy" and here != target:
            options = {key: value for key, value in self.kwargs.items() if key not in ("device", "non_blocking")}
            return moved(self.args[0], target, bool(self.kwargs.get("non_blocking")), options)
        if target is None:  # such as torch.empty_like(of a card's, device="cpu", pin_memory=True)
            found = self.func(*self.args, **self._on_cpu())
            if pinned:
                MEMORY.add(found, None, None)
            return found
        require_code(target)
        self._check_generator(target)
        stream = current_stream(target)
        if here is not None and self.namespace != "c10d":
            require_one_card(self.name, self.args, self.tensors, self.cards)
            wait_if_needed(self.name, self.args, self.kwargs, self.tensors, self.cards, stream)
        return self._work(target, stream)

    def _target(self, wanted: torch.device | None, here: int | None, caller: FrameType) -> int | None:
        """The card that the result is on. C++ sees tensors of the CPU, and makes others like them."""
        if wanted is None:
            return here
        if wanted.type == "cuda":
            return index_of(wanted)
        if self.name == "_to_copy":
            return None if THREAD.moving else here
        if _from_autograd(caller):
            return here if self.tensors else THREAD.last
        return None

    def _on_cpu(self) -> dict[str, Any]:
        return self.kwargs | {"device": torch.device("cpu")} if self.kwargs.get("device") is not None else self.kwargs

    def _copy(self) -> Tensor:
        target, source = self.args[:2]
        if self.cards[1] is None and THREAD.scalar and source.dim() == 0:
            return self.func(target, source)  # `tensor[...] = number`
        non_blocking = self.kwargs.get("non_blocking", self.args[2] if len(self.args) > 2 else False)
        return copy_into(target, source, bool(non_blocking))

    def _check_generator(self, target: int) -> None:
        generator = self.kwargs.get("generator")
        if generator is not None and (found := device_of(generator)) != DEVICES[target]:
            raise RuntimeError(f"Expected a '{DEVICES[target]}' generator device but found '{found}'")

    def _work(self, target: int, stream: Stream) -> Any:
        graph = capture_on(stream)
        kwargs = self._on_cpu()
        # gloo writes what it is given, whatever its schema says
        written = self.tensors if self.namespace == "c10d" else _written(self.func, self.args, kwargs)
        packed: Any = None
        if graph is not None:
            if self.name in _RANDOM:
                FINDINGS.note(NOTE, f"random numbers in a graph: {self.name}")
            for tensor in written:
                if card_of(tensor) is not None:
                    graph.will_write(tensor)
            packed = graph.pack(list(self.args)), {key: graph.pack(value) for key, value in kwargs.items()}
        found = self.func(*self.args, **kwargs)
        known = {tensor.untyped_storage()._cdata for tensor in self.tensors}
        outputs = flat(found)
        fresh = [tensor for tensor in outputs if tensor.untyped_storage()._cdata not in known]
        stream.tick()
        for tensor in fresh:
            MEMORY.add(tensor, target, stream, graph)
            if graph is not None:
                graph.adopt(tensor)
        if graph is not None:
            if fresh or written:
                run = functools.partial(_finished, self.func) if self.namespace == "c10d" else self.func
                own = {id(tensor) for tensor in fresh}
                new = [tensor.detach() if id(tensor) in own else None for tensor in outputs]
                graph.add(self.name, Node(run, packed[0], packed[1], new))
        elif not _is_view(self.func):
            marks = {id(tensor) for tensor in (*written, *fresh)}
            for tensor in (*self.tensors, *fresh):
                if (record := MEMORY.of(tensor)) is not None:
                    record.use(stream, id(tensor) in marks)
        return found


def _from_autograd(frame: FrameType | None) -> bool:
    """Whether C++ of autograd called, where it makes zeros like a gradient that it takes for the CPU's."""
    while frame is not None and frame.f_code.co_name in ("_fn", "inner"):  # torch's own wrappers of modes
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_engine_run_backward"


def _finished(func: Any, *args: Any, **kwargs: Any) -> Any:
    """A collective in a graph: what comes after it in the stream comes after its end."""
    found = func(*args, **kwargs)
    for one in found if isinstance(found, tuple) else (found,):
        if hasattr(one, "wait"):
            one.wait()
    return found


@functools.cache
def _is_view(func: Any) -> bool:
    return any(one.alias_info is not None and not one.alias_info.is_write for one in func._schema.returns)


@functools.cache
def _written_arguments(func: Any) -> list[tuple[int, str]]:
    arguments = enumerate(func._schema.arguments)
    return [(number, one.name) for number, one in arguments if one.alias_info is not None and one.alias_info.is_write]


def _written(func: Any, args: Any, kwargs: dict[str, Any]) -> list[Tensor]:
    found: list[Tensor] = []
    for number, name in _written_arguments(func):
        flat(args[number] if number < len(args) else kwargs.get(name), found)
    return found
