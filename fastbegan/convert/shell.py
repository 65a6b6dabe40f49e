"""`accelerate(model)` puts the fast layers under a model that was written without them; `restore` takes them out.

Each module with parts of its own gets a shell, a `forward` of the instance that runs the class's forward as Dynamo
follows it (`follow`). What Dynamo makes of it is rewritten (`rewrite`) and runs in eager mode. Modules, parameters and
state dict stay the same objects. `compare` checks outputs and gradients.
"""

from __future__ import annotations

import contextlib
import inspect
import types
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn
from torch._dynamo import OptimizedModule
from torch.utils._pytree import tree_leaves

from . import compare, follow
from .report import UNSEEN, Report
from .rewrite import rewrite, run

Model = TypeVar("Model", bound=nn.Module)
_IDLE = 64  # calls in which nothing is faster, after which one is followed again: the model may have changed
_ERRORS = 8  # calls of a forward that raise, after each of which it is followed anew


def accelerate(model: Model, *, example: Any = None, check: Any = None, compile: bool = False) -> Model:
    """Put the layers of `model` on the fast layers, in place.

    TorchDynamo follows the forward, and what it finds is specialised as torch.compile specialises it: branches, loops
    and attributes are followed as they are, and each change of them is followed anew. No compiler is needed: the rest
    of the forward runs in eager mode, or on Inductor with `compile=True`.

    Taken are these chains in [N, C, H, W], with zero padding, without dilation and groups:

    - nearest x2 (`nn.Upsample`, `F.interpolate`), 3x3 convolution of stride 1, then ELU, ReLU, LeakyReLU, SiLU
      (x * sigmoid(x) too) or nothing;
    - 3x3 or 1x1 convolution of stride 1 or 2, then one of these activations;
    - zero padding (0, 1, 0, 1), 3x3 convolution of stride 2, then one of these activations or nothing;
    - one of the above but SiLU's, then a 3x3 or 1x1 convolution of stride 1 or 2 without activation;
    - GroupNorm, then SiLU or nothing.

    On a GPU all of them are taken. On a CPU a chain is taken where it is faster (`gains`): up-convolutions from about
    256 input pixels N * H * W, and convolutions to an image behind them. Between fast layers maps stay channels_last.
    All other layers run as before.

    The model's class, modules, parameters, hooks and state dict are not changed, and optimizers made before stay valid.
    Only `forward` of the model and of its inner modules is new, on the instances. So `encode`, `decode` and inner
    blocks are fast too. Hooks fire, also those that are registered later. Gradient checkpointing stays what it is.

    The first call is followed, which takes seconds for a large model, and so is the first call of each variant: grad
    mode, autocast, dtype, values that the forward reads, and the first change of sizes. After 32 variants of one
    forward, further ones run as before, with a warning. Where Dynamo fails the forward runs as before, and the report
    gives the reason.

    `print(model.fastbegan_report)` shows what was taken, and what was left and why.

    `restore` undoes everything. `copy.deepcopy`, `pickle`, `torch.save` and DistributedDataParallel keep the fast
    layers. `copy.copy` and `nn.DataParallel` are not supported. Under an outer `torch.compile`, `torch.export`,
    `torch.jit.trace`, `torch.func` and forward-mode differentiation the model's own forward runs, as it does inside of
    a TorchDispatchMode. Second derivatives (`create_graph=True`) are exact, from torch's operations, and not faster
    than before.

    Args:
        model: Any nn.Module.
        example: The forward's argument (a tensor or a dict) or a tuple of all arguments. The model is called with it
            once, without gradients if they are off, so that the report is filled. Buffers and the random state are put
            back. None waits for the first call.
        check: The same, and outputs and all gradients are computed before and after. Both are compared with float64. An
            error may be four times as large as before, or as the model's in channels_last; a gradient's error is
            relative to the largest gradient of its layer. A gradient that fails must pass at two of three inputs moved
            by a thousandth: on the kink of a ReLU, rounding decides. None checks nothing.
        compile: Whether Inductor compiles what was rewritten. It needs a C++ compiler.

    Returns:
        `model` itself. A warning is given if `example` or `check` found nothing to take.

    Raises:
        RuntimeError: The check failed, and the model was restored. Or the model or a part of it is accelerated or
            compiled already, or the model is a torch.jit script.
        TypeError: `model` is no nn.Module, or `example` or `check` is of another type.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; accepted: an nn.Module")
    for name, given in (("example", example), ("check", check)):
        if given is not None and not isinstance(given, Tensor | dict | tuple):
            accepted = "a tensor, a dict, or a tuple of the forward's arguments"
            raise TypeError(f"{name} is a {type(given).__name__}; accepted: {accepted}")
    _require_untouched(model)
    before, exact = (None, None) if check is None else (compare.values(model, check), compare.truth(model, check))
    try:
        report, shells = _put(model, compile=compile)
        if example is not None:
            compare.called(model, example)
        if before is not None and exact is not None:
            words = _checked(model, check, before, exact, shells)
            report.checked = words if report.replaced else f"{words}; no fast layer ran"
    except BaseException:
        restore(model)
        raise
    if (example is not None or check is not None) and not report.replaced:
        warnings.warn("no layer was put on the fast layers; print(model.fastbegan_report) tells why", stacklevel=2)
    return model


def _require_untouched(model: nn.Module) -> None:
    if isinstance(model, torch.jit.ScriptModule):
        raise RuntimeError("the model is a torch.jit script, whose forward cannot be replaced")
    for path, module in model.named_modules():
        what = f"{path or 'the model'} ({type(module).__name__})"
        if _shell(module) is not None:
            raise RuntimeError(f"{what} is accelerated already; restore(model) takes that back")
        if getattr(module, "_compiled_call_impl", None) or isinstance(module, OptimizedModule):
            raise RuntimeError(f"{what} is compiled already; accelerate the model first, then compile it")


def _put(model: nn.Module, *, compile: bool) -> tuple[Report, list[FastForward]]:
    """Give `model` and its inner modules their shells."""
    model.fastbegan_report = report = Report()  # pyright: ignore[reportArgumentType, reportAttributeAccessIssue]
    shells: list[FastForward] = []
    for path, module in model.named_modules():
        if _may_have_shell(module) and (module is model or _has_parts(module)):
            shells.append(FastForward(module, path, report, compile=compile))
        kind = f"{type(module).__module__}.{type(module).__name__}"
        if isinstance(module, nn.Conv2d | nn.ConvTranspose2d | nn.GroupNorm):
            report.left[path] = UNSEEN
        elif "Conv" in kind and kind.startswith("torch.") and _has_weight(module):
            report.left[path] = f"a {kind}, and only nn.Conv2d is taken"
    for shell in shells:
        shell.module.forward = shell
    return report, shells


def _has_weight(module: nn.Module) -> bool:
    """Looks at names only: reading a parametrized weight computes it, and spectral norm counts its computations."""
    return not {"weight", "_packed_params"}.isdisjoint({*module._parameters, *module._buffers, *vars(module)})


def _may_have_shell(module: nn.Module) -> bool:
    """Whether the forward is a method of the class, and not somebody's own on the instance."""
    forward = inspect.getattr_static(type(module), "forward", None)
    is_method = (
        callable(forward) and hasattr(forward, "__get__") and not isinstance(forward, staticmethod | classmethod)
    )
    return is_method and "forward" not in module.__dict__ and not isinstance(module, torch.jit.ScriptModule)


def _has_parts(module: nn.Module) -> bool:
    """Whether a module is called for itself, and calls others."""
    own = type(module).__module__.split(".")[0] != "torch" or isinstance(module, nn.Sequential | fx.GraphModule)
    return own and bool(module._modules) and not nn.utils.parametrize.is_parametrized(module)


def _checked(
    model: nn.Module, example: Any, before: dict[str, Tensor], exact: dict[str, Tensor], shells: list[FastForward]
) -> str:
    """The largest errors in words. Raises RuntimeError where one is too large and no kink excuses it."""

    def compare_at(draw: int) -> compare.Comparison:
        moved = compare.moved(example, draw)
        with _original_forwards(shells):
            slow, truth = compare.values(model, moved), compare.truth(model, moved)
        return compare.compare(slow, compare.values(model, moved), truth)

    after = compare.values(model, example)
    comparison = compare.compare(before, after, exact)
    words = ""
    if comparison.too_far and exact:  # oneDNN adds less exactly in channels_last, in which fast layers compute
        with _original_forwards(shells):
            last = compare.compare(compare.in_channels_last(model, example), after, exact)
        words = f"; {sum(name in last.near for name in comparison.too_far)} values held to the model in channels_last"
        comparison = compare.either(comparison, last)
    excused = compare.excuse(comparison, compare_at)
    excused.require_near()
    if not comparison.too_far:
        return str(comparison) + words
    first, *others = comparison.too_far
    more = f" and {len(others)} more" if others else ""
    return f"{excused}{words}; kinks at {first}{more}: compared at inputs moved by a thousandth"


@contextlib.contextmanager
def _original_forwards(shells: list[FastForward]) -> Iterator[None]:
    """Inside, the model runs its original forwards."""
    for shell in shells:
        shell.module.__dict__.pop("forward")
    try:
        yield
    finally:
        for shell in shells:
            shell.module.forward = shell


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
    accelerated = [module for module in model.modules() if _shell(module) is not None]
    if not accelerated and report is None:
        raise RuntimeError("the model is not accelerated; nothing was changed")
    for module in accelerated:
        module.__dict__.pop("forward")
    if isinstance(report, Report):
        report.restored = True  # a wrapper somewhere may still hold and call a shell
    return model


def _shell(module: nn.Module) -> FastForward | None:
    forward = module.__dict__.get("forward")
    return forward if isinstance(forward, FastForward) else None


class FastForward:
    """The forward of an accelerated module: its class's forward, followed, on fast layers.

    It is an object and no function, so that copies and pickles of the module copy it too.

    Args:
        module: The module.
        path: Its path in the accelerated model.
        report: The model's report, which all its shells fill.
        compile: Whether Inductor compiles what was rewritten.
    """

    module: nn.Module
    path: str
    report: Report
    compile: bool

    def __init__(self, module: nn.Module, path: str, report: Report, *, compile: bool) -> None:
        self.__setstate__({"module": module, "path": path, "report": report, "compile": compile})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling():
            return self.own(self.module, *args, **kwargs)
        own = type(self.module).forward  # a class may have changed; Dynamo watches `self.own`
        if follow.is_watched() or follow.is_idle() or self.report.restored:
            return own(self.module, *args, **kwargs)
        call, outermost = _signature(args, kwargs), not follow.is_inside()
        if self.idle.get(call):
            self.idle[call] -= 1
            with follow.idle():
                return own(self.module, *args, **kwargs)
        if outermost:
            for shell in self._shells():
                shell.own = type(shell.module).forward
        if self.__dict__.get("followed") is not own:
            self.function = follow.function_of(own)
            self.followed = own
        self.graphs = self.taken = 0
        result = follow.call(self, self.function, self.module, *args, **kwargs)
        whole = outermost and not follow.was_in_parts() and not self.report.breaks
        if whole and not self.taken and not self.compile and (self.graphs or call in self.idle):
            self.idle[call] = _IDLE
        return result

    @property
    def __code__(self) -> types.CodeType:
        """The code of the class's forward, which torch.export looks at."""
        return self.own.__code__

    def _shells(self) -> list[FastForward]:
        """Those of this module and of all inside."""
        if "inner" not in self.__dict__:
            shells = [_shell(module) for module in self.module.modules()]
            self.inner = [shell for shell in shells if shell is not None]
        return self.inner

    def graph(self, module: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        """Rewrite a graph of this forward (`follow.Follower`).

        Args:
            module: Dynamo's graph.
            inputs: The values of its inputs.

        Returns:
            What runs in its place.
        """
        prefix = f"{self.path}." if self.path else ""
        paths = {id(value): prefix + name.rpartition(".")[0] for name, value in self.module.named_parameters()}
        placeholders = [node for node in module.graph.nodes if node.op == "placeholder"]
        owners = {
            node: paths[id(value)] for node, value in zip(placeholders, inputs, strict=True) if id(value) in paths
        }
        self.graphs += 1
        self.taken += rewrite(module, owners, self.report, compiled=self.compile)
        return run(module, inputs, compiled=self.compile)

    def note(self, reason: str) -> None:
        """Note why a part of this forward is not followed (`follow.Follower`).

        Args:
            reason: One line.
        """
        self.report.breaks[reason] = self.report.breaks.get(reason, 0) + 1

    def begin_anew(self) -> None:
        """Forget what was followed, unless that becomes a habit (`follow.Follower`)."""
        self.errors = self.__dict__.get("errors", 0) + 1
        if self.errors <= _ERRORS:
            self.followed = None

    def __getstate__(self) -> dict[str, Any]:
        # code is not pickled or copied: a copy is followed anew
        return {name: self.__dict__[name] for name in ("module", "path", "report", "compile")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__ |= state
        self.own: Callable[..., Any] = type(self.module).forward
        self.idle: dict[Any, int] = {}
        self.__signature__ = inspect.signature(self.own.__get__(self.module))


def _signature(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What of a call decides whether anything in it is faster."""
    given = [*args, *kwargs.values()] if kwargs else args
    if not all(isinstance(value, Tensor | int | float | str | None) for value in given):
        given = tree_leaves(given)
    return torch.is_grad_enabled(), *(_kind(value) for value in given)


def _kind(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_nested:
        return type(value)
    return value.shape, value.dtype, value.device
