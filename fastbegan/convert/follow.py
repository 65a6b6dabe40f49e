"""Follows a forward with TorchDynamo and gives each graph that comes of it to a backend of ours.

Dynamo specialises a graph on all that the forward read, and guards it: grad mode, autocast, dtypes, shapes, attributes,
modules, hooks. One compiled function a module keeps modules of one class apart.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import threading
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
import torch._dynamo.callback
import torch._dynamo.utils
from torch import fx
from torch.autograd import forward_ad
from torch.fx import _symbolic_trace

VARIANTS = 32
"""Graphs that Dynamo may make of one forward; calls beyond them run the model's own forward."""
_SETTINGS: dict[str, Any] = {
    "recompile_limit": VARIANTS,
    "skip_nnmodule_hook_guards": False,  # hooks that are registered later are called
    "allow_unspec_int_on_nn_module": True,  # a forward that counts its calls is not followed anew at each
    "suppress_errors": True,  # where Dynamo fails, the forward runs as it is
    "optimize_ddp": False,  # which splits graphs; gradients come one by one all the same
}


class Follower(Protocol):
    """Who is followed: gets the graphs, and the reasons where there is none."""

    def graph(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """What runs in place of a graph."""
        ...

    def note(self, reason: str) -> None:
        """Why a forward, or a part of it, is not followed."""
        ...

    def begin_anew(self) -> None:
        """Forget what was followed."""
        ...


class _Running(threading.local):
    """The follower whose forward runs in this thread."""

    follower: Follower | None = None
    parts: bool = False
    idle: bool = False
    failures: list[str]

    def __init__(self) -> None:
        self.failures = []


_running = _Running()
# torch 2.7 has one of them; later ones warn of the other
_is_fx_tracing: Callable[[], bool] = getattr(_symbolic_trace, "is_fx_symbolic_tracing", _symbolic_trace.is_fx_tracing)
_quiet: warnings.catch_warnings | None = None
_SHARED = "'__call__'"


def function_of(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function that runs `forward`, and follows it at the first call of each variant.

    It has a code object of its own, where Dynamo keeps what it compiled. With it everything is freed.
    """
    if isinstance(forward, types.FunctionType) and (forward.__module__ or "").partition(".")[0] != "torch":
        code, space = forward.__code__.replace(), forward.__globals__
        own = types.FunctionType(code, space, forward.__name__, forward.__defaults__, forward.__closure__)
        own.__kwdefaults__ = forward.__kwdefaults__
    else:  # Dynamo would wrap torch's functions by one that all of them share

        def inner(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs)

        own = types.FunctionType(inner.__code__.replace(), globals(), "forward", None, inner.__closure__)
    return torch.compile(own, backend=_backend)


def call(follower: Follower, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function of `function_of` for a follower."""
    outer = _running.follower
    if outer is not None:  # inside of a forward that is followed in parts
        _running.follower, _running.parts = follower, True
        try:
            return function(*args, **kwargs)
        finally:
            _running.follower = outer
    _listen()
    _running.follower, _running.parts = follower, False
    breaks = torch._dynamo.utils.counters["graph_break"]
    before = dict(breaks)
    try:
        with _settings():
            result = function(*args, **kwargs)
    except Exception:
        follower.begin_anew()  # the user's error, after which Dynamo may pass by this forward for good
        raise
    else:
        for reason in _running.failures:
            follower.note(reason)
        return result
    finally:
        _running.follower = None
        _running.failures = []
        if breaks != before:
            for reason in breaks:
                if breaks[reason] > before.get(reason, 0):
                    follower.note(reason.splitlines()[0])


_patches: dict[object, tuple[Any, int]] = {}  # by thread, or of all: what is patched, and by how many calls
_lock = threading.Lock()


@functools.cache
def _is_global() -> bool:
    """Whether all threads have one configuration of Dynamo, as in torch 2.7."""
    seen: list[object] = []
    with torch._dynamo.config.patch(recompile_limit=VARIANTS):
        thread = threading.Thread(target=lambda: seen.append(torch._dynamo.config.recompile_limit))
        thread.start()
        thread.join()
    return seen == [VARIANTS]


@contextlib.contextmanager
def _settings() -> Iterator[None]:
    """_SETTINGS inside. The first call that needs them patches, and the last one that is done puts back."""
    owner = None if _is_global() else threading.get_ident()
    with _lock:
        patch, calls = _patches.get(owner, (None, 0))
        if patch is None:
            patch = torch._dynamo.config.patch(**_SETTINGS)
        if not calls:
            patch.__enter__()
        _patches[owner] = patch, calls + 1
    try:
        yield
    finally:
        with _lock:
            patch, calls = _patches[owner]
            if calls == 1:
                patch.__exit__(None, None, None)
            _patches[owner] = patch, calls - 1


def was_in_parts() -> bool:
    """Whether other shells ran inside the call that this thread did last."""
    return _running.parts


def is_inside() -> bool:
    """Whether this thread runs a forward that is followed."""
    return _running.follower is not None


def is_idle() -> bool:
    """Whether this thread runs a forward in which nothing is faster."""
    return _running.idle


@contextlib.contextmanager
def idle() -> Iterator[None]:
    """Inside, nothing is followed."""
    before, _running.idle = _running.idle, True
    try:
        yield
    finally:
        _running.idle = before


def is_watched() -> bool:
    """Whether torch.compile, export, jit.trace, torch.func or forward-mode differentiation look at what runs."""
    return (
        torch.compiler.is_dynamo_compiling()  # of this thread; is_compiling() tells of others, too
        or torch.compiler.is_exporting()
        or torch.jit.is_tracing()
        or _is_fx_tracing()
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
    )


def _backend(module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    # one for all: Dynamo keeps backends for ever
    follower = _running.follower
    return module.forward if follower is None else follower.graph(module, inputs)


_log = logging.getLogger("torch._dynamo.convert_frame")


def _listen() -> None:
    """Hear what Dynamo tells of its work. Without a follower of ours nothing changes."""
    handler = torch._dynamo.callback.callback_handler
    if _hush not in handler.start_callbacks:  # the first time, and after torch.compiler.reset()
        _log.addFilter(_overhear)
        handler.register_start_callback(_hush)
        handler.register_end_callback(_speak)


def _hush(*_: object) -> None:
    """Looking at inputs, Dynamo makes torch warn of what no user did; with warnings as errors it would fail."""
    global _quiet
    if _running.follower is not None and _quiet is None:
        _quiet = warnings.catch_warnings()
        _quiet.__enter__()
        warnings.filterwarnings("ignore", message="The .grad attribute of a Tensor that is not a leaf")
        warnings.simplefilter("ignore", DeprecationWarning)
        warnings.simplefilter("ignore", FutureWarning)  # others, as of kernels that are not used, reach the user


def _speak(*_: object) -> None:
    # the last of the threads that compile may be another than the first
    global _quiet
    if _quiet is not None:
        _quiet.__exit__(None, None, None)
        _quiet = None


def _overhear(record: logging.LogRecord) -> bool:
    """Dynamo tells errors that it suppresses, and its limit, to its log only. Whether the log keeps the record."""
    follower = _running.follower
    if follower is None:
        return True
    error = record.exc_info[1] if record.exc_info else None
    if error is not None:
        cause = getattr(error, "inner_exception", None) or error
        _running.failures.append(f"{type(cause).__name__}: {next(iter(str(cause).strip().splitlines()), '')}")
        return False
    if "recompile_limit" in record.getMessage():
        if _SHARED in record.getMessage():  # the frame of a shell, whose forward has a limit of its own
            return False
        warnings.warn(
            f"a forward has more than {VARIANTS} variants (grad mode, autocast, dtypes, shapes, values that it reads): "
            "further ones run without fast layers",
            stacklevel=2,
        )
        return False
    return True
