"""Follows a module's forward with torch.fx, and records on which attributes the result depends.

torch.fx runs a forward once on proxies and records the operations in a graph. Python values at that moment (a branch on
`self.training`, a number in an attribute, a default argument) become constants, and a later call may need others. So
every attribute that the forward reads is recorded here (`Followed.reads`), for its value to be compared at each call.
A forward is refused (CannotFollowError) if it reads a value that cannot be compared, writes attributes, keeps proxies,
draws random numbers, or switches gradients or autocast.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import inspect
import operator
import random
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.utils.checkpoint
from torch import Tensor, fx, nn
from torch.fx.proxy import TraceError
from torch.utils._python_dispatch import TorchDispatchMode


class MISSING:
    """Marks an attribute that was read and did not exist."""


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_MODULE_FIELDS = frozenset(vars(nn.Module())) - {"training"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), np.generic)
_FIXED = (torch.dtype, torch.device, torch.layout, torch.memory_format, type, types.ModuleType)  # immutable
_CALLED = (types.FunctionType, types.BuiltinFunctionType, types.MethodType)
_FOLLOWING = threading.RLock()  # one at a time: torch.fx patches nn.Module itself


class CannotFollowError(Exception):
    """The reason why a forward cannot be followed."""


def hooked(module: nn.Module) -> bool:
    """Whether the module has hooks, or a forward of its own in place of its class's."""
    return any(getattr(module, name) for name in _HOOKS) or "forward" in vars(module)


@dataclass
class Followed:
    """The operations in the forward of `root`, and the attributes on which they depend."""

    root: nn.Module
    arguments: list[str]
    """Names of the arguments without a default."""
    graph: fx.Graph
    inlined: list[nn.Module] = field(default_factory=list)
    """Submodules whose operations are in the graph, in place of a call."""
    reads: list[tuple[nn.Module, str, Any]] = field(default_factory=list)
    """Module, attribute, and the value that was read, or MISSING."""


class _Proxy(fx.Proxy):
    """A proxy that refuses type checks by the forward: `isinstance(x, Tensor)` would be false, unlike in a call."""

    @property
    def __class__(self) -> type:  # pyright: ignore[reportIncompatibleMethodOverride]
        frame = sys._getframe(1)
        if _of_a_user(frame) or frame.f_code.co_name == "is_tensor":
            raise CannotFollowError(f"{frame.f_code.co_name} asks for the type of a value")
        return _Proxy


def _in_place(target: Callable[..., Any]) -> Callable[..., Any]:
    """A method for `x += y`, which fx would otherwise record as `x = x + y`."""
    return lambda self, other: self.tracer.create_proxy("call_function", target, (self, other), {})


for _name in "add sub mul matmul truediv floordiv mod pow and or xor lshift rshift".split():
    setattr(_Proxy, f"__i{_name}__", _in_place(getattr(operator, f"i{_name}")))


def _of_a_user(frame: types.FrameType) -> bool:
    name = frame.f_globals.get("__name__", "")
    return not (name == "torch" or name.startswith("torch.") or name == __name__)


class _Tracer(fx.Tracer):
    proxy_buffer_attributes = True

    def __init__(self, opaque: set[nn.Module]) -> None:
        super().__init__(autowrap_modules=())
        self.opaque = opaque
        self.inlined: dict[nn.Module, None] = {}
        self.failed: nn.Module | None = None
        self.thread = threading.get_ident()
        self.proxies: list[weakref.ref[fx.Proxy]] = []
        self._mode = _mode()

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        from_torch = type(m).__module__.split(".")[0] == "torch"
        return m in self.opaque or (from_torch and not isinstance(m, nn.Sequential))

    def call_module(self, m: nn.Module, forward: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:  # another model, which meets fx's patches in another thread
            return forward(*args, **kwargs)
        if m not in set(self.root.modules()):
            if type(m) is nn.Sequential:  # a slice of a Sequential is a new module of old layers
                return forward(*args, **kwargs)
            raise CannotFollowError(f"it makes a {type(m).__name__} inside")
        try:
            if not self.is_leaf_module(m, ""):
                self.inlined[m] = None
            return super().call_module(m, forward, args, kwargs)
        except Exception:
            self.failed = self.failed or m  # the innermost
            raise

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        if threading.get_ident() != self.thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def proxy(self, node: fx.Node) -> fx.Proxy:
        proxy = _Proxy(node, self)
        self.proxies.append(weakref.ref(proxy))
        return proxy

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        if _mode() != self._mode:
            raise CannotFollowError(_SWITCHES)
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        if isinstance(a, np.generic):
            a = a.item()
        if type(a) is not _Proxy and isinstance(a, Tensor) and not self._known(a):
            raise CannotFollowError("it makes a tensor out of nothing but numbers")
        return super().create_arg(a)

    def _known(self, tensor: Tensor) -> bool:
        known = [*self.root.parameters(), *self.root.buffers(), *self.tensor_attrs]
        return any(tensor is other for other in known)

    def create_args_for_root(self, root_fn: Any, is_module: bool, concrete_args: Any = None) -> tuple[Any, list[Any]]:
        """Makes proxies only for arguments without a default."""
        return root_fn, [self.root, *(self.create_proxy("placeholder", name, (), {}) for name in required(root_fn))]


def required(forward: Any) -> list[str]:
    """Names of the arguments without a default, except self. Raises CannotFollowError if one is keyword-only."""
    _, *parameters = inspect.signature(forward).parameters.values()
    names = []
    for parameter in parameters:
        variadic = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
        if variadic or parameter.default is not parameter.empty:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY:
            raise CannotFollowError(f"its argument {parameter.name} has to be named")
        names.append(parameter.name)
    return names


def follow(root: nn.Module, opaque: dict[nn.Module, str]) -> Followed:
    """Follow the forward of `root`.

    Submodules in `opaque` become one call each. Submodules that cannot be followed are added to it, with the reason.
    Raises CannotFollowError if `root` itself cannot be followed.
    """
    while True:  # each round follows, fails at `root`, or adds one submodule to `opaque`
        reads: dict[tuple[int, str], tuple[nn.Module, str, Any]] = {}
        with _FOLLOWING, torch.inference_mode(False), torch.enable_grad(), _no_autocast():
            tracer = _Tracer(set(opaque))
            try:
                with _unchanged(root), _same_draws(), _noted(reads), _no_switches():
                    graph = tracer.trace(root)
                _require_nothing_kept(tracer)
                for module, name, value in reads.values():
                    tracer.failed = None if module is root else module
                    _require_fixed(module, name, value)
                return Followed(root, required(type(root).forward), graph, list(tracer.inlined), list(reads.values()))
            except Exception as error:  # a forward may raise anything when it runs on proxies
                reason = str(error).strip().partition("\n")[0] or type(error).__name__
                if isinstance(error, TraceError):
                    reason = "it branches on values or shapes"
                if tracer.failed is None or tracer.failed in opaque:
                    raise CannotFollowError(reason) from None
                opaque[tracer.failed] = reason


def unlike(now: Any, before: Any) -> bool:
    """Whether an attribute differs from the value that was read."""
    if before is MISSING or now is MISSING:
        return now is not before
    if type(now) is not type(before):
        return True
    return now != before if isinstance(before, (*_PLAIN, list, tuple, dict)) else now is not before


def _require_fixed(module: nn.Module, name: str, value: Any) -> None:
    """Raises CannotFollowError for a mutable object, which can change unseen, and for one that the forward changed."""
    what = f"{type(module).__name__}.{name}"
    if value is MISSING:
        return
    if not _is_fixed(value):
        raise CannotFollowError(f"it reads {what}, a {type(value).__name__}, which may change unseen")
    now = vars(module).get(name)
    if isinstance(value, list | dict) and type(now) is type(value) and now != value:
        _fill(now, copy.deepcopy(value))
        raise CannotFollowError(f"it writes {what}")


def _is_fixed(value: Any) -> bool:
    if isinstance(value, dict):
        return all(map(_is_fixed, value.values()))
    if isinstance(value, list | tuple):
        return all(map(_is_fixed, value))
    return isinstance(value, (*_PLAIN, *_FIXED, *_CALLED))


_SWITCHES = "it switches gradients or autocast on or off inside"


def _mode() -> tuple[object, ...]:
    autocast = [torch.is_autocast_enabled(device) for device in ("cpu", "cuda")]
    return torch.is_grad_enabled(), torch.is_inference_mode_enabled(), *autocast


@contextlib.contextmanager
def _no_autocast() -> Iterator[None]:
    with torch.autocast("cpu", enabled=False), torch.autocast("cuda", enabled=False):
        yield


@contextlib.contextmanager
def _noted(reads: dict[tuple[int, str], tuple[nn.Module, str, Any]]) -> Iterator[None]:
    """Record the attributes of modules that are read inside.

    Parameters, buffers and submodules are left out: the followed forward reads them again at each call.
    """
    thread = threading.get_ident()

    def recording(self: nn.Module, name: str) -> Any:
        try:
            value = object.__getattribute__(self, name)
        except AttributeError:
            if threading.get_ident() == thread and _of_a_user(sys._getframe(1)):
                fields = object.__getattribute__(self, "__dict__")
                registered = [fields.get(kind, {}) for kind in ("_parameters", "_buffers", "_modules")]
                value = next((members[name] for members in registered if name in members), MISSING)
                if value is None or value is MISSING:
                    reads.setdefault((id(self), name), (self, name, value))
            raise
        if threading.get_ident() == thread and name not in _MODULE_FIELDS and not name.startswith("__"):
            on_instance = name in object.__getattribute__(self, "__dict__")
            if on_instance and not isinstance(value, Tensor | nn.Module) and (id(self), name) not in reads:
                # a copy, because the forward may change a list or dict after it has read it
                snapshot = copy.deepcopy(value) if isinstance(value, list | dict) and _is_fixed(value) else value
                reads[id(self), name] = self, name, snapshot
        return value

    before = vars(nn.Module).get("__getattribute__")
    nn.Module.__getattribute__ = recording  # pyright: ignore[reportAttributeAccessIssue]
    try:
        yield
    finally:
        if before is None:
            del nn.Module.__getattribute__
        else:
            nn.Module.__getattribute__ = before


@contextlib.contextmanager
def _no_switches() -> Iterator[None]:
    """Refuse forwards that set or read a mode (gradients, autocast, saved tensors): the graph does not record it."""

    def refusing(real: Callable[..., Any], reason: str) -> Callable[..., Any]:
        def refuse(*args: Any, **kwargs: Any) -> Any:
            if threading.get_ident() == thread:
                raise CannotFollowError(reason)
            return real(*args, **kwargs)

        return refuse

    def refusing_users(real: Callable[..., Any]) -> Callable[..., Any]:
        def refuse(*args: Any) -> Any:
            if threading.get_ident() == thread and _of_a_user(sys._getframe(1)):
                raise CannotFollowError("it asks whether gradients or autocast are on")
            return real(*args)

        return refuse

    thread = threading.get_ident()
    keeps = "it changes what the backward keeps (torch.utils.checkpoint, saved_tensors_hooks)"
    apart = {torch.utils.checkpoint.CheckpointFunction: "apply", torch.autograd.graph.saved_tensors_hooks: "__enter__"}
    switches = (torch.no_grad, torch.enable_grad, torch.inference_mode, torch.autocast)
    with contextlib.ExitStack() as stack:
        for owner, name in apart.items():
            stack.enter_context(mock.patch.object(owner, name, refusing(getattr(owner, name), keeps)))
        for switch in switches:
            stack.enter_context(mock.patch.object(switch, "__enter__", refusing(switch.__enter__, _SWITCHES)))
        for name in ("is_grad_enabled", "is_autocast_enabled", "is_inference_mode_enabled"):
            stack.enter_context(mock.patch.object(torch, name, refusing_users(getattr(torch, name))))
        yield


_DRAWS = "it draws random numbers that depend on no tensor"


class _NoDraws(TorchDispatchMode):
    """Refuses random numbers of torch: drawn while following, they would become constants."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise CannotFollowError(_DRAWS)
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _same_draws() -> Iterator[None]:
    """Refuse random numbers of torch, Python and NumPy, and put the states of the last two back."""
    before = random.getstate(), np.random.get_state()
    failed = True
    try:
        with _NoDraws():
            yield
        failed = False
    finally:
        moved = random.getstate() != before[0] or str(np.random.get_state()) != str(before[1])
        if moved:
            random.setstate(before[0])
            np.random.set_state(before[1])
    if moved and not failed:
        raise CannotFollowError(_DRAWS)


def _require_nothing_kept(tracer: _Tracer) -> None:
    """Raises CannotFollowError if a proxy is still referenced: the forward stores a value somewhere at each call."""
    if any(ref() is not None for ref in tracer.proxies):
        gc.collect()
    if any(ref() is not None for ref in tracer.proxies):
        raise CannotFollowError("it keeps a value somewhere")


@contextlib.contextmanager
def _unchanged(root: nn.Module) -> Iterator[None]:
    """Put back all that a forward writes into its modules, and raise CannotFollowError if it writes anything."""
    before = {module: {name: _shallow(value) for name, value in vars(module).items()} for module in root.modules()}
    tensors = {
        (module, name): (value, value._version, value.detach().clone())
        for module in root.modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    }
    failed = True
    try:
        yield
        failed = False
    finally:
        written = []
        for module, attributes in before.items():
            for name in {*vars(module), *attributes}:
                # `before` itself stands for an attribute that does not exist
                now, (value, items) = vars(module).get(name, before), attributes.get(name, (before, None))
                if now is value and _shallow(value)[1] == items:
                    continue
                written.append(f"{type(module).__name__}.{name}")
                _put_back(module, name, value, items, before)
        for (module, name), (value, version, clone) in tensors.items():
            if value._version != version:
                written.append(f"{type(module).__name__}.{name}")
                with torch.no_grad():
                    value.copy_(clone)
    if written and not failed:
        raise CannotFollowError(f"it writes {written[0]}")


def _shallow(value: Any) -> tuple[Any, Any]:
    """A value and, if it is a container, its items: key, identity and item."""
    if isinstance(value, dict):
        return value, [(key, id(item), item) for key, item in value.items()]
    container = isinstance(value, list | set | collections.deque)
    return value, [(number, id(item), item) for number, item in enumerate(value)] if container else None


def _fill(value: Any, items: Any) -> None:
    """Replace the contents of a container by `items`, a dict or a list."""
    value.clear()
    (value.update if isinstance(value, dict | set) else value.extend)(items)


def _put_back(module: nn.Module, name: str, value: Any, items: Any, absent: object) -> None:
    if value is absent:
        del vars(module)[name]
        return
    vars(module)[name] = value
    if isinstance(value, dict):
        _fill(value, {key: item for key, _, item in items})
    elif items is not None:
        _fill(value, [item for _, _, item in items])
