"""Follow a module's forward with torch.fx, and know when what was seen holds no longer.

torch.fx runs a forward once on stand-ins and writes down what it does. What is Python at that moment (a branch on
`self.training`, a number read from an attribute, a default argument) is fixed in the result. All that modules were
asked for is noted here, so that a call can be told that would go another way, and what cannot be noted is refused.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError

_PLAIN = (bool, int, float, str, type(None))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class CannotFollowError(Exception):
    """Why a forward cannot be followed."""


def hooked(module: nn.Module) -> bool:
    """Whether something is called before or after this module, forward or back."""
    return any(getattr(module, name) for name in _HOOKS)


@dataclass
class Followed:
    """What the forward of `root` does, and what that rests on."""

    root: nn.Module
    arguments: list[str]
    graph: fx.Graph
    inlined: list[nn.Module] = field(default_factory=list)
    reads: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    """Attributes that were read, with their values."""


class _Proxy(fx.Proxy):
    """A stand-in that does not let itself be asked whether it is a tensor: it would say no, and a tensor yes."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        frame = sys._getframe(1)
        asker = frame.f_globals.get("__name__", "")
        if not asker.startswith("torch") or frame.f_code.co_name == "is_tensor":
            raise CannotFollowError(f"{asker}.{frame.f_code.co_name} asks for the type of a value")
        return _Proxy


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__(autowrap_modules=())
        self.opaque = opaque
        self.inlined: dict[nn.Module, None] = {}
        self.failed: nn.Module | None = None
        self._mode = _mode()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        own = type(m).__module__.split(".")[0] == "torch"
        return m in self.opaque or (own and not isinstance(m, nn.Sequential))

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        try:
            if not self.is_leaf_module(m, ""):
                self.inlined[m] = None
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m  # the innermost
            raise

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _mode() != self._mode:
            raise CannotFollowError("it switches gradients or autocast on or off inside")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if type(a) is not _Proxy and isinstance(a, Tensor) and not self._known(a):
            raise CannotFollowError("it makes a tensor out of nothing but numbers")
        return super().create_arg(a)

    def _known(self, tensor: Tensor) -> bool:
        root = self.root
        known = [*root.parameters(), *root.buffers(), *self.tensor_attrs]
        return any(tensor is one for one in known)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Stand-ins for what has no default only."""
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in required(root_fn))]


def required(forward: Any) -> list[str]:
    """Names of the arguments without a default, but for self. Raises CannotFollowError where one has to be named."""
    _, *parameters = inspect.signature(forward).parameters.values()
    names = []
    for parameter in parameters:
        if parameter.default is not parameter.empty or parameter.kind in (
            parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD,
        ):  # fmt: skip
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise CannotFollowError(f"its argument {parameter.name} has to be named")
        names.append(parameter.name)
    return names


def follow(root: nn.Module, opaque: dict[nn.Module, str]) -> Followed:
    """What `root` does. Submodules in `opaque` are not entered; those that cannot be followed are added to it, and why.

    Raises CannotFollowError where it is `root` itself.
    """
    while True:
        tracer = _Tracer(set(opaque))
        reads: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
        try:
            with _unchanged(root), _noted(reads), _no_checkpointing():
                graph = tracer.trace(root)
        except Exception as error:  # whatever a forward may raise when it runs on stand-ins
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            if isinstance(error, TraceError):
                reason = "it branches on values or shapes"
            if tracer.failed is None or tracer.failed in opaque:
                raise CannotFollowError(reason) from None
            opaque[tracer.failed] = reason
            continue
        return Followed(root, required(type(root).forward), graph, list(tracer.inlined), list(reads.values()))


def _mode() -> tuple[object, ...]:
    devices = ("cpu", "cuda")
    autocast = [(torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in devices]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


def _is_plain(value: object) -> bool:
    return type(value) in _PLAIN or (type(value) in (list, tuple) and all(map(_is_plain, value)))  # pyright: ignore[reportArgumentType]


@contextlib.contextmanager
def _noted(reads: dict[tuple[int, str], tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Note which plain attributes of modules are read."""

    def noting(self: nn.Module, name: str) -> Any:
        value = object.__getattribute__(self, name)
        if not name.startswith("_") and _is_plain(value):
            kept = list(value) if type(value) is list else value
            reads.setdefault((id(self), name), (self, name, kept))
        return value

    nn.Module.__getattribute__ = noting  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        del nn.Module.__getattribute__


@contextlib.contextmanager
def _no_checkpointing() -> Iterator[None]:
    """Recomputation in the backward, with re-entrance or by hooks, would get lost without a word."""

    def refuse(*_: object, **__: object) -> Any:
        raise CannotFollowError("it changes what the backward keeps (torch.utils.checkpoint, saved_tensors_hooks)")

    with (
        mock.patch.object(torch.utils.checkpoint.CheckpointFunction, "apply", refuse),
        mock.patch.object(torch.autograd.graph.saved_tensors_hooks, "__enter__", refuse),
    ):
        yield


@contextlib.contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Put back what a forward writes into its modules, and raise CannotFollowError if it does."""
    before = {module: {name: _shallow(value) for name, value in vars(module).items()} for module in root.modules()}
    failed = True
    try:
        yield
        failed = False
    finally:
        written = []
        for module, kept in before.items():
            for name in {*vars(module), *kept}:
                now, (value, items) = vars(module).get(name, before), kept.get(name, (before, None))
                if now is value and _shallow(value)[1] == items:
                    continue
                written.append(f"{type(module).__name__}.{name}")
                _put_back(module, name, value, items, before)
        if written and not failed:
            raise CannotFollowError(f"it writes {written[0]}")


def _shallow(value: Any) -> tuple[Any, Any]:
    """A value and, of what can change, what is in it."""
    if isinstance(value, dict):
        return value, [(name, id(one), one) for name, one in value.items()]
    return value, [(number, id(one), one) for number, one in enumerate(value)] if isinstance(value, list) else None


def _put_back(module: nn.Module, name: str, value: Any, items: Any, absent: object) -> None:
    if value is absent:
        del vars(module)[name]
        return
    vars(module)[name] = value
    if isinstance(value, dict):
        value.clear()
        value.update({key: one for key, _, one in items})
    elif isinstance(value, list):
        value[:] = [one for _, _, one in items]
