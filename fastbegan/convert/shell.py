"""`accelerate(model)`: the fast layers under a model that knows nothing of them, and `restore` to take them out.

The forward of a model is followed with torch.fx, chains of [nearest x2] -> convolution -> [activation] are put on
`fastbegan_kernels`, and the model's instance gets that forward. Modules, parameters and state dict stay what they are.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import inspect
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from . import chains, compare
from .follow import MISSING, CannotFollowError, Followed, follow, hooked, unlike

Model = TypeVar("Model", bound=nn.Module)
_GLOBAL_HOOKS = (
    "_global_forward_hooks",
    "_global_forward_pre_hooks",
    "_global_backward_hooks",
    "_global_backward_pre_hooks",
)


@dataclass(frozen=True)
class Report:
    """What `accelerate` did: `replaced` and `left` by the path of each convolution, `checked` the errors it found."""

    replaced: dict[str, str] = field(default_factory=dict)
    left: dict[str, str] = field(default_factory=dict)
    checked: str = "not checked"
    forwards: list[FastForward] = field(default_factory=list, repr=False, compare=False)

    def __str__(self) -> str:
        width = max(map(len, [*self.replaced, *self.left]), default=0)
        lines = [f"fast  {place:{width}}  {what}" for place, what in self.replaced.items()]
        lines += [f"left  {place:{width}}  {why}" for place, why in self.left.items()]
        count = f"{len(self.replaced)} of {len(self.replaced) + len(self.left)} convolutions on fast layers"
        return "\n".join([*lines, f"{count}; {self.checked}"])


def accelerate(model: Model, *, check: Any = None) -> Model:
    """Put `model` on the fast layers, in place, and return it; `model.fastbegan_report` says what was done.

    Taken are 3x3 convolutions (1x1 with an activation) with zero padding, of stride 1 or 2, with a nearest x2 before
    them (nn.Upsample, F.interpolate) or one of ELU, ReLU, LeakyReLU and SiLU behind them, or padded (0, 1, 0, 1), or
    right behind such a layer; what is anything else is left as it is. Class, modules, parameters, hooks and
    state dict are untouched: only the instance's `forward` is another one, which goes back to the model's own whenever
    the model is not what it was (replaced layers, new hooks, changed attributes, other arguments), with a warning.

    With `check`, the forward's argument (a tensor or a dict) or a tuple of all of them, outputs and gradients are
    compared before and after. Raises RuntimeError, and restores the model, where an error against float64 is more than
    four times what it was, beside the largest gradient of its layer. It is excused where it is not so at two of three
    inputs close by: at the kink of a ReLU rounding decides.
    Raises RuntimeError for a model that is accelerated or compiled already, TypeError for what is no nn.Module, and for
    a `check` of another kind.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted: an nn.Module")
    if check is not None and not isinstance(check, Tensor | dict | tuple):
        accepted = "a tensor, a dict, or a tuple of the forward's arguments"
        raise TypeError(f"check is a {type(check).__name__}; accepted: {accepted}")
    if isinstance(model, torch.jit.ScriptModule):
        raise RuntimeError("the model is a torch.jit script, whose forward cannot be replaced")
    for path, module in model.named_modules():
        what = f"{path or 'the model'} ({type(module).__name__})"
        if _fast(module) is not None:
            raise RuntimeError(f"{what} is accelerated already; restore(model) takes that back")
        if getattr(module, "_compiled_call_impl", None) or isinstance(module, torch._dynamo.OptimizedModule):
            raise RuntimeError(f"{what} is compiled already; accelerate the model first, then compile it")
    if any(getattr(torch.nn.modules.module, name, None) for name in _GLOBAL_HOOKS):
        raise RuntimeError("hooks on all modules are registered (register_module_forward_hook); remove them first")
    before, exact = (None, None) if check is None else (compare.values(model, check), compare.truth(model, check))
    try:
        report = _put(model)
        model.fastbegan_report = report  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        if before is not None and exact is not None:
            with mock.patch.object(chains, "conv_stage", side_effect=chains.conv_stage) as counted:
                words = _checked(model, check, before, exact, report.forwards)
            words = words if counted.called else "the check did not come to a fast layer: the model's own forward ran"
            model.fastbegan_report = dataclasses.replace(report, checked=words)  # pyright: ignore
    except BaseException:
        model.fastbegan_report = Report()  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
        restore(model)
        raise
    if not report.replaced:
        warnings.warn("no convolution was replaced; model.fastbegan_report says why", stacklevel=2)
    return model


def _checked(
    model: nn.Module, example: Any, before: dict[str, Tensor], exact: dict[str, Tensor], forwards: list[FastForward]
) -> str:
    """The largest errors in words. Raises RuntimeError where one is too large, and not excused by a kink."""

    def compare_at(draw: int) -> compare.Comparison:
        close = compare.moved(example, draw)
        with _own_forwards(forwards):
            own, truth = compare.values(model, close), compare.truth(model, close)
        return compare.compare(own, compare.values(model, close), truth)

    comparison = compare.compare(before, compare.values(model, example), exact)
    excused = compare.excuse(comparison, compare_at)
    excused.require_near()
    if not comparison.too_far:
        return str(comparison)
    first, *others = comparison.too_far
    more = f" and {len(others)} more" if others else ""
    return f"{excused}; kinks at {first}{more}: compared at inputs moved by a thousandth"


@contextlib.contextmanager
def _own_forwards(forwards: list[FastForward]) -> Iterator[None]:
    """The model's own forwards inside."""
    taken = [(fast.root, fast.root.__dict__.pop("forward")) for fast in forwards]
    try:
        yield
    finally:
        for root, forward in taken:
            root.forward = forward


def _put(model: nn.Module) -> Report:
    replaced, left, forwards = {}, {}, []
    for path, module, followed, found, why in _parts(model):
        prefix = f"{path}." if path else ""
        for chain in found:
            replaced |= {prefix + place: words for place, words in zip(chain.places, chain.words, strict=True)}
        left |= {prefix + place: reason for place, reason in why.items()}
        if found:
            assert followed is not None
            forwards.append(FastForward(followed, found))
            module.forward = forwards[-1].forward
    for path, module in model.named_modules():
        if "Conv" in type(module).__name__ and path not in replaced and _weighs(module):
            left.setdefault(path, _reason(module))
    return Report(replaced, {path: why for path, why in left.items() if path not in replaced}, forwards=forwards)


def restore(model: Model) -> Model:
    """Give `model` its own forward back, in place. Raises RuntimeError if it is not accelerated."""
    report = model.__dict__.pop("fastbegan_report", None)
    found = [module for module in model.modules() if _fast(module) is not None]
    if not found and report is None:
        raise RuntimeError("the model is not accelerated; nothing was changed")
    forwards = report.forwards if isinstance(report, Report) else []
    for fast in (*forwards, *(module.__dict__.pop("forward").__self__ for module in found)):
        fast.function = _out  # somebody may have wrapped it
    return model


def _fast(module: nn.Module) -> FastForward | None:
    found = getattr(module.__dict__.get("forward"), "__self__", None)
    return found if isinstance(found, FastForward) else None


def _weighs(module: nn.Module) -> bool:
    """Whether it has a weight, without computing one that is parametrized (spectral norm counts how often it is)."""
    inside = {**module._parameters, **module._buffers, **vars(module)}
    return "weight" in inside or "_packed_params" in inside or nn.utils.parametrize.is_parametrized(module, "weight")


def _reason(module: nn.Module) -> str:
    if isinstance(module, LazyModuleMixin):
        return "a lazy module that has not run yet: run the model once, then accelerate it"
    if isinstance(module, nn.Conv2d):
        return "no forward that could be followed calls it"
    return f"a {type(module).__module__}.{type(module).__name__}, no convolution of ours"


Part = tuple[str, nn.Module, "Followed | None", list[chains.Chain], dict[str, str]]


def _parts(model: nn.Module) -> Iterator[Part]:
    """The largest modules whose forward can be followed, with their chains, and why others are left."""
    seen: set[nn.Module] = set()
    waiting: list[tuple[str, nn.Module]] = [("", model)]
    while waiting:
        path, module = waiting.pop(0)
        if module in seen:
            continue
        seen.add(module)
        children = [(f"{path}.{name}" if path else name, child) for name, child in module.named_children()]
        if type(module).__module__.split(".")[0] == "torch" and not isinstance(module, nn.Sequential):
            waiting += children  # lists and dicts of modules, and what wraps a model
            continue
        # who listens to a module wants it to be called
        opaque = {one: "it has hooks" for one in module.modules() if one is not module and hooked(one)}
        try:
            if "forward" in module.__dict__:
                raise CannotFollowError("its forward was replaced by somebody")
            followed = follow(module, opaque)
        except CannotFollowError as error:
            inner = [name for name, one in module.named_modules() if isinstance(one, nn.Conv2d)]
            why = f"{path or 'the model'} ({type(module).__name__}) cannot be followed: {error}"
            yield path, module, None, [], dict.fromkeys(inner, why)
            waiting += children
            continue
        found, left = chains.find(followed)
        yield path, module, followed, found, left
        entered = {module, *followed.inlined}
        seen |= entered
        for one in entered:
            prefix = next(name for name, other in model.named_modules() if other is one)
            waiting += [
                (f"{prefix}.{name}" if prefix else name, child)
                for name, child in one.named_children()
                if child not in entered
            ]


class FastForward:
    """The forward of an accelerated module: its own on fast layers, as long as the module is what it was."""

    def __init__(self, followed: Followed, found: Sequence[chains.Chain]) -> None:
        self.root, self.warned = followed.root, False
        self.names = followed.arguments
        self.function: Callable[..., Any] | None = chains.put(followed, list(found))
        silent = {module: None for chain in found for module in chain.modules}
        watched = dict.fromkeys((*followed.inlined, *silent))
        paths = [path for path, one in self.root.named_modules(remove_duplicate=False) if one in watched and path]
        above = {path.rsplit(".", number)[0] for path in paths for number in range(1, path.count(".") + 1)}
        parents = dict.fromkeys((self.root, *followed.inlined, *map(self.root.get_submodule, above)))
        self.links = [(parent, list(parent._modules.items())) for parent in parents]
        self.kinds = [(module, type(module), type(module).forward) for module in dict.fromkeys((self.root, *watched))]
        self.settings = list(followed.reads)
        self.settings += [setting for module in silent for setting in chains.settings(module)]

    @property
    def forward(self) -> types.MethodType:
        """What the module's instance gets: a method, which copies and pickles follow to their own copy of this."""
        if "method" not in self.__dict__:
            # with code of its own: torch.compile compiles the code of an object only so many times
            function = types.FunctionType(_forward.__code__.replace(), globals(), "forward")
            function.__signature__ = inspect.signature(type(self.root).forward)  # pyright: ignore
            self.method = function
        return types.MethodType(self.method, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        own = type(self.root).forward
        if self.function is None:
            self._again()  # pyright: ignore[reportCallIssue]
        if self.function is _out:
            return own(self.root, *args, **kwargs)
        rest = self.names[len(args) :]
        given = (*args, *(kwargs[name] for name in rest if name in kwargs))
        changed = self._changed()
        exactly = len(given) == len(self.names) and len(kwargs) == len(rest)
        if not exactly or not all(isinstance(one, Tensor) for one in given):
            changed = "it was called with other arguments than one tensor for each that has no default"
        if changed is not None:
            self._warn(changed)
            return own(self.root, *args, **kwargs)
        assert self.function is not None
        return self.function(self.root, *given)

    def _changed(self) -> str | None:
        """What of the module is not what it was."""
        for parent, children in self.links:
            now = parent._modules
            if len(now) != len(children):
                return f"{type(parent).__name__} has other modules"
            for name, child in children:
                if now.get(name) is not child:
                    return f"{type(parent).__name__}.{name} is another module"
        for module, kind, forward in self.kinds:
            if type(module) is not kind or kind.forward is not forward:
                return f"a {kind.__name__} has another class or forward"
            if module is not self.root and getattr(module.forward, "__func__", None) is not forward:
                return f"a {kind.__name__} has a forward of its own"
            if module is not self.root and (module._forward_hooks or module._forward_pre_hooks):
                return f"a {kind.__name__} has hooks"
            if module is not self.root and (module._backward_hooks or module._backward_pre_hooks):
                return f"a {kind.__name__} has hooks"
        for name in _GLOBAL_HOOKS:
            if getattr(torch.nn.modules.module, name):
                return "all modules have hooks"
        for module, name, value in self.settings:
            if unlike(getattr(module, name, MISSING), value):
                then = "missing" if value is MISSING else repr(value)
                return f"{type(module).__name__}.{name} is no longer {then}"
        return None

    def _warn(self, changed: str) -> None:
        if not self.warned and not torch.compiler.is_compiling():
            self.warned = True
            warnings.warn(
                f"{changed}: {type(self.root).__name__} runs its own forward; to accelerate it as it is now, "
                "restore(model) and accelerate(model) again",
                stacklevel=4,
            )

    @torch.compiler.disable
    def _again(self) -> None:
        """After unpickling: code is not pickled."""
        del self.root.__dict__["forward"]
        try:
            opaque = {one: "it has hooks" for one in self.root.modules() if one is not self.root and hooked(one)}
            followed = follow(self.root, opaque)
            self.__init__(followed, chains.find(followed)[0])
        except CannotFollowError as error:
            self.function = _out
            self._warn(f"it can no longer be followed ({error})")
        finally:
            self.root.forward = self.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> FastForward:
        made = FastForward.__new__(FastForward)
        memo[id(self)] = made
        for name in ("root", "links", "kinds"):
            made.__dict__[name] = copy.deepcopy(self.__dict__.get(name), memo)
        made.names, made.warned, made.function = self.names, False, self.function
        # values are compared with what the copied modules have: they stay
        settings = self.__dict__.get("settings", [])
        made.settings = [(copy.deepcopy(module, memo), name, value) for module, name, value in settings]
        return made

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "names": self.names, "function": None, "warned": False}


def _out(*_: Any) -> Any:
    """In place of the function of a forward that was taken out."""
    raise AssertionError


def _forward(fast: FastForward, *args: Any, **kwargs: Any) -> Any:
    return fast(*args, **kwargs)
