"""`accelerate(model)` puts the fast layers under a model that was written without them; `restore` takes them out.

`follow` traces the model's forward with torch.fx. `chains` replaces each [nearest x2] -> convolution -> [activation] in
it by one call of `fastbegan_kernels`. The model's instance gets the new forward; modules, parameters and state dict
stay the same objects. `compare` checks outputs and gradients.
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
from typing import Any, NamedTuple, TypeVar
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
    """What `accelerate` did with each convolution of a model. `print` shows it as a table."""

    replaced: dict[str, str] = field(default_factory=dict)
    """By path: the operations that are one call now."""
    left: dict[str, str] = field(default_factory=dict)
    """By path: why the convolution runs as before."""
    checked: str = "not checked"
    """The largest errors that `check` found."""
    forwards: list[FastForward] = field(default_factory=list, repr=False, compare=False)

    def __str__(self) -> str:
        width = max(map(len, [*self.replaced, *self.left]), default=0)
        lines = [f"fast  {place:{width}}  {what}" for place, what in self.replaced.items()]
        lines += [f"left  {place:{width}}  {why}" for place, why in self.left.items()]
        count = f"{len(self.replaced)} of {len(self.replaced) + len(self.left)} convolutions on fast layers"
        return "\n".join([*lines, f"{count}; {self.checked}"])


def accelerate(model: Model, *, check: Any = None) -> Model:
    """Put the convolutions of `model` on the fast layers, in place.

    The forward is traced with torch.fx. Where the forward of the whole model cannot be traced, those of its largest
    submodules that can be are used.

    Taken are these chains in [N, C, H, W], with zero padding, without dilation and groups:

    - nearest x2 (`nn.Upsample`, `F.interpolate` with `scale_factor=2`), 3x3 convolution of stride 1, then ELU, ReLU,
      LeakyReLU, SiLU or nothing;
    - 3x3 or 1x1 convolution of stride 1 or 2, then one of these activations;
    - zero padding (0, 1, 0, 1), 3x3 convolution of stride 2, then one of these activations or nothing;
    - one of the above but SiLU's, then a 3x3 or 1x1 convolution of stride 1 or 2 without activation.

    Everything else runs as before: other kernels, padding modes and resizings, transposed convolutions, modules with
    hooks, subclasses of `nn.Conv2d`, and forwards that branch on values or shapes, draw random numbers, keep state or
    switch autocast or gradients. Normalisation layers stay where they are. `torch.nn.utils.parametrizations` (weight
    norm, spectral norm) are computed as before.

    `model.fastbegan_report` lists what was taken and what was left: `replaced` and `left` map the path of each
    convolution to what it became or to the reason, `checked` holds the errors; `print` shows all three.

    The model's class, modules, parameters, hooks and state dict are not changed, and optimizers made before stay valid.
    Only the instance's `forward` is new. It falls back to the class's own forward, with one warning, when

    - a layer, class, hook, patched forward, or attribute that the forward reads is no longer the same;
    - it is called with anything but one tensor per argument without default.

    Inputs that the fast layers do not compute (not 4-dimensional, of mixed types, on devices other than CPU and CUDA)
    run on torch's operations, without a warning.

    `restore` undoes everything. `copy.deepcopy`, `pickle`, `torch.save` and DistributedDataParallel keep the fast
    layers; an unpickled model is traced again at its first call. `copy.copy` and `nn.DataParallel` are not supported.
    Call `accelerate` before `torch.compile`. `torch.export` and `torch.jit.trace` record torch's operations only.
    Second derivatives (`create_graph=True`) are exact, from torch's operations, and not faster than before. For
    `torch.func` and forward-mode differentiation, restore the model or set FASTBEGAN_IMPL=reference.

    Limits: globals and files that a forward reads are fixed when it is traced. Methods other than `forward` (`encode`,
    `decode`) and separately called inner modules stay as they are. Output and input gradient are channels_last if and
    only if input or weight is; `model.to(memory_format=torch.channels_last)` avoids copies.

    Args:
        model: Any nn.Module. Lazy modules in it must have run once, or they are left.
        check: The forward's argument (a tensor or a dict) or a tuple of all arguments. Outputs and all gradients for it
            are computed before and after, and both are compared with float64. An error may be four times as large as
            before; a gradient's error is relative to the largest gradient of its layer. A gradient that fails must pass
            at two of three inputs moved by a thousandth: on the kink of a ReLU, rounding decides. None checks nothing.

    Returns:
        `model` itself. A warning is given if no convolution was replaced.

    Raises:
        RuntimeError: The check failed (the model is restored first); or the model, or a part of it, is accelerated,
            compiled or scripted already; or hooks on all modules are registered.
        TypeError: `model` is no nn.Module, or `check` is of another type.
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
    """The largest errors in words. Raises RuntimeError where one is too large and no kink excuses it."""

    def compare_at(draw: int) -> compare.Comparison:
        moved = compare.moved(example, draw)
        with _original_forwards(forwards):
            slow, truth = compare.values(model, moved), compare.truth(model, moved)
        return compare.compare(slow, compare.values(model, moved), truth)

    comparison = compare.compare(before, compare.values(model, example), exact)
    excused = compare.excuse(comparison, compare_at)
    excused.require_near()
    if not comparison.too_far:
        return str(comparison)
    first, *others = comparison.too_far
    more = f" and {len(others)} more" if others else ""
    return f"{excused}; kinks at {first}{more}: compared at inputs moved by a thousandth"


@contextlib.contextmanager
def _original_forwards(forwards: list[FastForward]) -> Iterator[None]:
    """Inside, the model runs its original forwards."""
    removed = [(fast.root, fast.root.__dict__.pop("forward")) for fast in forwards]
    try:
        yield
    finally:
        for root, forward in removed:
            root.forward = forward


def _put(model: nn.Module) -> Report:
    """Give the followed parts of `model` their fast forwards, and report on every convolution."""
    replaced, left, forwards = {}, {}, []
    for part in _parts(model):
        prefix = f"{part.path}." if part.path else ""
        for chain in part.chains:
            replaced |= {prefix + place: words for place, words in zip(chain.places, chain.words, strict=True)}
        left |= {prefix + place: reason for place, reason in part.left.items()}
        if part.chains:
            assert part.followed is not None
            forwards.append(FastForward(part.followed, part.chains))
            part.followed.root.forward = forwards[-1].forward
    for path, module in model.named_modules():
        if "Conv" in type(module).__name__ and path not in replaced and _has_weight(module):
            left.setdefault(path, _reason(module))
    return Report(replaced, {path: why for path, why in left.items() if path not in replaced}, forwards=forwards)


def restore(model: Model) -> Model:
    """Undo `accelerate`, in place: give `model` and its parts their original forwards back.

    Args:
        model: An accelerated model, or a deep or unpickled copy of one.

    Returns:
        `model` itself, without `fastbegan_report`.

    Raises:
        RuntimeError: The model is not accelerated.
    """
    report = model.__dict__.pop("fastbegan_report", None)
    accelerated = [module for module in model.modules() if _fast(module) is not None]
    if not accelerated and report is None:
        raise RuntimeError("the model is not accelerated; nothing was changed")
    forwards = report.forwards if isinstance(report, Report) else []
    for fast in (*forwards, *(module.__dict__.pop("forward").__self__ for module in accelerated)):
        fast.function = _removed  # a wrapper somewhere may still hold and call this forward
    return model


def _fast(module: nn.Module) -> FastForward | None:
    owner = getattr(module.__dict__.get("forward"), "__self__", None)
    return owner if isinstance(owner, FastForward) else None


def _has_weight(module: nn.Module) -> bool:
    """Looks at names only: reading a parametrized weight computes it, and spectral norm counts its computations."""
    names = {*module._parameters, *module._buffers, *vars(module)}
    return "weight" in names or "_packed_params" in names or nn.utils.parametrize.is_parametrized(module, "weight")


def _reason(module: nn.Module) -> str:
    if isinstance(module, LazyModuleMixin):
        return "a lazy module that has not run yet: run the model once, then accelerate it"
    if isinstance(module, nn.Conv2d):
        return "no forward that could be followed calls it"
    return f"a {type(module).__module__}.{type(module).__name__}, and only nn.Conv2d is taken"


class _Part(NamedTuple):
    """A module at `path`, followed or not, its chains, and by path below it why other convolutions are left."""

    path: str
    followed: Followed | None
    chains: list[chains.Chain]
    left: dict[str, str]


def _parts(model: nn.Module) -> Iterator[_Part]:
    """The largest modules whose forward can be followed, and those above them, which cannot."""
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
        try:
            if "forward" in module.__dict__:
                raise CannotFollowError("its forward was replaced by somebody")
            followed = follow(module, _with_hooks(module))
        except CannotFollowError as error:
            why = f"{path or 'the model'} ({type(module).__name__}) cannot be followed: {error}"
            inner = [name for name, child in module.named_modules() if isinstance(child, nn.Conv2d)]
            yield _Part(path, None, [], dict.fromkeys(inner, why))
            waiting += children
            continue
        yield _Part(path, followed, *chains.find(followed))
        inlined = {module, *followed.inlined}
        seen |= inlined
        for parent in inlined:
            prefix = next(name for name, other in model.named_modules() if other is parent)
            waiting += [
                (f"{prefix}.{name}" if prefix else name, child)
                for name, child in parent.named_children()
                if child not in inlined
            ]


def _with_hooks(root: nn.Module) -> dict[nn.Module, str]:
    """Modules under `root` that are not to be inlined: a hook fires only if its module is called."""
    return {module: "it has hooks" for module in root.modules() if module is not root and hooked(module)}


class FastForward:
    """The forward of an accelerated module. It runs the original one once the module has changed.

    Args:
        followed: The traced forward of `followed.root`.
        layers: The chains in it, from `chains.find`.
    """

    def __init__(self, followed: Followed, layers: Sequence[chains.Chain]) -> None:
        self.root, self.warned = followed.root, False
        self.names = followed.arguments
        self.function: Callable[..., Any] | None = chains.put(followed, list(layers))
        # modules inside a chain are no longer called, so nothing but these guards would notice their changes
        silent = {module: None for chain in layers for module in chain.modules}
        watched = dict.fromkeys((*followed.inlined, *silent))
        paths = [path for path, module in self.root.named_modules(remove_duplicate=False) if module in watched and path]
        above = {path.rsplit(".", number)[0] for path in paths for number in range(1, path.count(".") + 1)}
        parents = dict.fromkeys((self.root, *followed.inlined, *map(self.root.get_submodule, above)))
        self.links = [(parent, list(parent._modules.items())) for parent in parents]
        self.kinds = [(module, type(module), type(module).forward) for module in dict.fromkeys((self.root, *watched))]
        self.settings = list(followed.reads)
        self.settings += [setting for module in silent for setting in chains.settings(module)]

    @property
    def forward(self) -> types.MethodType:
        """The value of the instance's `forward`: a method, so that copies and pickles of the module copy this too."""
        if "method" not in self.__dict__:
            # with its own code object: torch.compile gives up on one that is compiled too often
            function = types.FunctionType(_forward.__code__.replace(), globals(), "forward")
            function.__signature__ = inspect.signature(type(self.root).forward)  # pyright: ignore
            self.method = function
        return types.MethodType(self.method, self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        original = type(self.root).forward
        if self.function is None:
            self._follow_again()  # pyright: ignore[reportCallIssue]
        if self.function is _removed:
            return original(self.root, *args, **kwargs)
        rest = self.names[len(args) :]
        inputs = (*args, *(kwargs[name] for name in rest if name in kwargs))
        changed = self._changed()
        exactly = len(inputs) == len(self.names) and len(kwargs) == len(rest)
        if not exactly or not all(isinstance(value, Tensor) for value in inputs):
            changed = "it was called with other arguments than one tensor for each that has no default"
        if changed is not None:
            self._warn(changed)
            return original(self.root, *args, **kwargs)
        assert self.function is not None
        return self.function(self.root, *inputs)

    def _changed(self) -> str | None:
        """The first difference between the module now and when it was followed."""
        for parent, children in self.links:
            current = parent._modules
            if len(current) != len(children):
                return f"{type(parent).__name__} has other modules"
            for name, child in children:
                if current.get(name) is not child:
                    return f"{type(parent).__name__}.{name} is another module"
        for module, kind, forward in self.kinds:
            if type(module) is not kind or kind.forward is not forward:
                return f"a {kind.__name__} has another class or forward"
            if module is not self.root and getattr(module.forward, "__func__", None) is not forward:
                return f"a {kind.__name__} has a forward of its own"
            hooks = module._forward_hooks or module._forward_pre_hooks
            if module is not self.root and (hooks or module._backward_hooks or module._backward_pre_hooks):
                return f"a {kind.__name__} has hooks"
        for name in _GLOBAL_HOOKS:
            if getattr(torch.nn.modules.module, name):
                return "all modules have hooks"
        for module, name, value in self.settings:
            if unlike(getattr(module, name, MISSING), value):
                before = "missing" if value is MISSING else repr(value)
                return f"{type(module).__name__}.{name} is no longer {before}"
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
    def _follow_again(self) -> None:
        """After unpickling, `function` is missing: code is not pickled."""
        del self.root.__dict__["forward"]
        try:
            followed = follow(self.root, _with_hooks(self.root))
            self.__init__(followed, chains.find(followed)[0])
        except CannotFollowError as error:
            self.function = _removed
            self._warn(f"it can no longer be followed ({error})")
        finally:
            self.root.forward = self.forward

    def __deepcopy__(self, memo: dict[int, Any]) -> FastForward:
        copied = FastForward.__new__(FastForward)
        memo[id(self)] = copied
        for name in ("root", "links", "kinds"):
            copied.__dict__[name] = copy.deepcopy(self.__dict__.get(name), memo)
        copied.names, copied.warned, copied.function = self.names, False, self.function
        # the values are not copied: attributes are compared with them by identity
        settings = self.__dict__.get("settings", [])
        copied.settings = [(copy.deepcopy(module, memo), name, value) for module, name, value in settings]
        return copied

    def __getstate__(self) -> dict[str, Any]:
        return {"root": self.root, "names": self.names, "function": None, "warned": False}


def _removed(*_: Any) -> Any:
    """Marks a `FastForward` that `restore` has removed; it is compared with, never called."""
    raise AssertionError


def _forward(fast: FastForward, *args: Any, **kwargs: Any) -> Any:
    return fast(*args, **kwargs)
