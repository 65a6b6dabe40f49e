"""[Upsample] -> Conv2d -> [activation] in a followed forward, put on the fast layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastbegan_kernels import conv_stage
from fastbegan_kernels.reference import plain_layer

from .follow import Followed, hooked
from .writes import Writes

_INTERPOLATE = "input size scale_factor mode align_corners recompute_scale_factor antialias".split()
_CONV = "input weight bias stride padding dilation groups".split()
_PAD = "input pad mode value".split()
# names of what an activation is given, and which of them is alpha, with its default
_ACTIVATIONS: dict[Any, tuple[str, str, float | None]] = {
    F.elu: ("elu", "input alpha inplace", 1.0),
    F.elu_: ("elu", "input alpha", 1.0),
    F.relu: ("relu", "input inplace", None),
    F.relu_: ("relu", "input", None),
    torch.relu: ("relu", "input", None),
    torch.relu_: ("relu", "input", None),
    F.leaky_relu: ("leaky_relu", "input negative_slope inplace", 0.01),
    F.leaky_relu_: ("leaky_relu", "input negative_slope", 0.01),
    F.silu: ("silu", "input inplace", None),
    "relu": ("relu", "input", None),
    "relu_": ("relu", "input", None),
}
_ACTIVATION_MODULES: dict[type, tuple[str, str | None]] = {
    nn.ELU: ("elu", "alpha"), nn.ReLU: ("relu", None), nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.SiLU: ("silu", None),
}  # fmt: skip
# by stride and by padding: what the convolution adds by itself, or what was added to it before
_KINDS = {
    ((1, 1), (1, 1)): "same", ((1, 1), (1, 1, 1, 1)): "same", ((2, 2), (1, 1)): "down", ((2, 2), (1, 1, 1, 1)): "down",
    ((2, 2), (0, 1, 0, 1)): "down_end",
}  # fmt: skip
_KINDS_1X1 = {((1, 1), (0, 0)): "same", ((2, 2), (0, 0)): "down"}
_CONFIG = "stride padding dilation groups padding_mode transposed kernel_size".split()


class _NotTakenError(Exception):
    """Why a convolution is left alone."""


@dataclass
class Chain:
    """Layers that become one call; `nodes` are what it replaces, the last one's value is the result."""

    x: fx.Node
    nodes: list[fx.Node]
    weights: list[Any]
    """Nodes, or the paths of convolutions whose weight it is."""
    biases: list[Any]
    kinds: list[str]
    paddings: list[int]
    """What a convolution pads by itself, or for "down_end" what is padded before it."""
    activations: list[str]
    alpha: float | None
    """None where no activation takes one."""
    places: list[str]
    modules: list[nn.Module] = field(default_factory=list)
    """Those whose own forward is not called any more."""
    words: list[str] = field(default_factory=list)
    alone: str | None = None
    """Why it is left where no chain before it takes it along."""


def find(followed: Followed) -> tuple[list[Chain], dict[str, str]]:
    """The chains in the order of the forward, neighbours joined, and by place why a convolution is left alone."""
    modules = dict(followed.root.named_modules(remove_duplicate=False))
    writes = Writes(followed.graph, modules)
    chains: list[Chain] = []
    left: dict[str, str] = {}
    for node in followed.graph.nodes:
        if not _is_convolution(node, modules):
            continue
        place = str(node.target) if node.op == "call_module" else _place(node)
        try:
            chains.append(_chain(node, place, modules, writes))
        except _NotTakenError as error:
            left[place] = str(error)
    found = _joined(chains, writes)
    taken = {place for chain in found for place in chain.places}
    left |= {place: chain.alone for chain in chains for place in chain.places if chain.alone}
    return found, {place: why for place, why in left.items() if place not in taken}


def _is_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.Conv2d)
    return node.op == "call_function" and node.target in (F.conv2d, torch.conv2d)


def _place(node: fx.Node) -> str:
    """Where a function is called: the path of the module that does."""
    stack = node.meta.get("nn_module_stack") or {}
    paths = [path for path, _ in stack.values()]
    return paths[-1] if paths and paths[-1] else node.name


def _arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else value


@dataclass
class _Convolution:
    x: fx.Node
    weight: Any
    bias: Any
    window: tuple[int, int] | None
    stride: Any
    padding: Any
    words: str
    modules: list[nn.Module]


def _convolution(node: fx.Node, place: str, modules: dict[str, nn.Module]) -> _Convolution:
    if node.op == "call_module":
        conv = modules[place]
        assert isinstance(conv, nn.Conv2d)
        if isinstance(conv, LazyModuleMixin):
            raise _NotTakenError("a lazy module that has not run yet: run the model once, then accelerate it")
        parametrized = nn.utils.parametrize.is_parametrized(conv)
        if type(conv) is not nn.Conv2d and not (parametrized and type(conv).__mro__[1] is nn.Conv2d):
            raise _NotTakenError(f"a {type(conv).__module__}.{type(conv).__name__}, not torch's own")
        if hooked(conv):
            raise _NotTakenError("it has hooks")
        if conv.padding_mode != "zeros":
            raise _NotTakenError(f"its padding mode is {conv.padding_mode}")
        given: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        given |= {"input": _arguments(node, ["input"])["input"], "weight": place}
        given["bias"] = place if _has_bias(conv) else None
        window, used = (conv.kernel_size[0], conv.kernel_size[1]), [cast(nn.Module, conv)]
        words = f"{conv.in_channels} -> {conv.out_channels}"
    else:
        given = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1} | _arguments(node, _CONV)
        window, words, used = None, "weights made by the forward", []
    if _pair(given["dilation"]) != (1, 1) or given["groups"] != 1:
        raise _NotTakenError("it is dilated or in groups")
    if window is not None and window not in ((3, 3), (1, 1)):
        raise _NotTakenError(f"its kernel is {window[0]}x{window[1]}")
    padding = given["padding"]
    if padding == "same":
        padding = (1, 1) if window == (3, 3) else (0, 0) if window == (1, 1) else padding
    padding = (0, 0) if padding == "valid" else _pair(padding)
    if not isinstance(given["input"], fx.Node):
        raise _NotTakenError("its input is not a tensor of the forward")
    return _Convolution(
        given["input"], given["weight"], given["bias"], window, _pair(given["stride"]), padding, words, used
    )


def _has_bias(conv: nn.Module) -> bool:
    """Without computing one that is parametrized."""
    return conv._parameters.get("bias") is not None or nn.utils.parametrize.is_parametrized(conv, "bias")


def _chain(node: fx.Node, place: str, modules: dict[str, nn.Module], writes: Writes) -> Chain:
    conv = _convolution(node, place, modules)
    x, nodes, used = conv.x, [node], list(conv.modules)
    around: Any = conv.padding
    padded = _zero_padding(x, modules) if around == (0, 0) and conv.window != (1, 1) else None
    if padded:
        around, nodes = padded.numbers, [x, node]
        x, used = padded.x, used + padded.owners
    kind = (_KINDS_1X1 if conv.window == (1, 1) else _KINDS).get((conv.stride, around))
    if kind is None:
        raise _NotTakenError(f"stride {conv.stride}, padding {around} is none of ours")
    words = [f"{'1x1' if conv.window == (1, 1) else '3x3'} convolution {conv.words}"]
    words[0] += "" if kind == "same" else ", stride 2"
    why_not = None
    if kind == "same" and conv.window != (1, 1):
        doubled = _doubling(x, modules)
        if isinstance(doubled, _Before) and writes.later(doubled.x, x):
            why_not = "what is upsampled before it is written to later"  # and no copy of it would be there
        elif isinstance(doubled, _Before):
            kind, nodes, words = "up", [x, *nodes], ["nearest x2", *words]
            x, used = doubled.x, used + doubled.owners
        else:
            why_not = doubled
    activation, alpha = "none", None
    user = next(iter(node.users)) if _alone(node) else None
    after = None if user is None else _activation(user, node, modules)
    # what is changed where it is must not be what the gradient is told from
    if user is not None and after is not None and not writes.later(user, user):
        activation, alpha, owners = after
        nodes, used = [*nodes, user], used + owners
        words.append(activation)
    if activation == "none" and kind in ("same", "down"):
        why_not = why_not or "nothing to join before or behind it"
    else:
        why_not = None
    if padded and kind != "up" and writes.later(x, nodes[0]):
        raise _NotTakenError("what is padded before it is written to later")
    if writes.between(nodes):
        raise _NotTakenError("something is written to between its parts")
    return Chain(
        x, nodes, [conv.weight], [conv.bias], [kind], [0 if conv.window == (1, 1) else 1], [activation], alpha, [place],
        used, [", ".join(words)], why_not,
    )  # fmt: skip


@dataclass
class _Before:
    """What a chain takes in place of a padding or an upsampling: its input, and the modules that did it."""

    x: fx.Node
    owners: list[nn.Module]
    numbers: tuple[int, ...] = ()


def _alone(node: fx.Node) -> bool:
    """Whether only the chain sees this value."""
    return len(node.users) == 1


def _owner(node: fx.Node, modules: dict[str, nn.Module], kinds: tuple[type, ...]) -> nn.Module | None:
    if node.op != "call_module" or type(modules[str(node.target)]) not in kinds or hooked(modules[str(node.target)]):
        return None
    return modules[str(node.target)]


def _zero_padding(node: fx.Node, modules: dict[str, nn.Module]) -> _Before | None:
    owners: list[nn.Module] = []
    if owner := _owner(node, modules, (nn.ZeroPad2d, nn.ConstantPad2d)):
        given = {"pad": owner.padding, "value": getattr(owner, "value", 0.0), "mode": "constant"}
        given["input"], owners = _arguments(node, ["input"])["input"], [owner]
    elif node.op == "call_function" and node.target is F.pad:
        given = {"mode": "constant", "value": None} | _arguments(node, _PAD)
    else:
        return None
    x, pad = given["input"], given["pad"]
    zeros = given["mode"] == "constant" and given["value"] in (None, 0)
    if not (zeros and _alone(node) and isinstance(x, fx.Node) and isinstance(pad, list | tuple)):
        return None
    numbers = tuple(one for one in pad if isinstance(one, int))
    return _Before(x, owners, numbers) if len(numbers) == len(pad) == 4 else None


def _doubling(node: fx.Node, modules: dict[str, nn.Module]) -> _Before | str | None:
    """What is doubled by nearest neighbours; a word on what kind of resizing it is otherwise, None if it is none."""
    if owner := _owner(node, modules, (nn.Upsample, nn.UpsamplingNearest2d)):
        given = {"size": owner.size, "scale_factor": owner.scale_factor, "mode": owner.mode}
        given["input"], owners = _arguments(node, ["input"])["input"], [owner]
    elif node.op == "call_function" and node.target in (F.interpolate, F.upsample, F.upsample_nearest):
        given = {"size": None, "scale_factor": None, "mode": "nearest"} | _arguments(node, _INTERPOLATE)
        owners = []
    else:
        return None
    if given["mode"] not in ("nearest", "nearest-exact"):
        return f"the upsampling before it is {given['mode']}"
    factor = given["scale_factor"]
    factors = factor if isinstance(factor, list | tuple) else (factor, factor)
    if given["size"] is not None or any(not isinstance(one, int | float) or one != 2 for one in factors):
        return "the upsampling before it is not by a scale_factor of 2"
    if not _alone(node):
        return "what is upsampled before it is used elsewhere too"
    return _Before(given["input"], owners) if isinstance(given["input"], fx.Node) else None


def _activation(
    node: fx.Node, x: fx.Node, modules: dict[str, nn.Module]
) -> tuple[str, float | None, list[nn.Module]] | None:  # fmt: skip
    """Its name, its alpha (None where it takes none) and the modules that compute it."""
    owners: list[nn.Module] = []
    if owner := _owner(node, modules, tuple(_ACTIVATION_MODULES)):
        (name, attribute), owners = _ACTIVATION_MODULES[type(owner)], [owner]
        alpha = None if attribute is None else getattr(owner, attribute)
    elif node.op in ("call_function", "call_method") and node.target in _ACTIVATIONS:
        name, names, alpha = _ACTIVATIONS[node.target]
        given = _arguments(node, names.split())
        alpha = given.get("alpha", given.get("negative_slope", alpha))
        if not {*names.split()} >= {*given} or given.get("input") is not x:
            return None
    else:
        return None
    if alpha is None:
        return name, None, owners
    return (name, float(alpha), owners) if isinstance(alpha, int | float) and alpha >= 0 else None


def _joined(chains: list[Chain], writes: Writes) -> list[Chain]:
    """Chains whose value only the next one takes, of one alpha, as one; SiLU's layers run one by one anyway."""
    found: list[Chain] = []
    for chain in chains:
        for number, before in enumerate(found):
            alphas = [one.alpha for one in (before, chain) if one.alpha is not None]
            same = len({*alphas}) < 2 and "silu" not in before.activations + chain.activations
            biased = [None not in one.biases for one in (before, chain)]
            none = [one.biases.count(None) == len(one.biases) for one in (before, chain)]
            calm = not writes.between([*before.nodes, *chain.nodes])
            if before.nodes[-1] is chain.x and _alone(chain.x) and same and calm and (all(biased) or all(none)):
                merged = {
                    name: getattr(before, name) + getattr(chain, name)
                    for name in "nodes weights biases kinds paddings activations places modules words".split()
                }
                found[number] = Chain(before.x, alpha=alphas[0] if alphas else None, **merged)
                break
        else:
            if not chain.alone:
                found.append(chain)
    return found


def put(followed: Followed, chains: list[Chain]) -> Callable[..., Any]:
    """The forward with `chains` as calls of `run`: a function of the module and its arguments."""
    graph = followed.graph
    calls: dict[Any, fx.Node] = {}  # of the chains so far, by the node that they stand for
    for chain in chains:
        last = chain.nodes[-1]
        with graph.inserting_before(last):
            weights = [_value(graph, calls.get(one, one), "weight") for one in chain.weights]
            biases = [_value(graph, calls.get(one, one), "bias") for one in chain.biases]
            given = (
                calls.get(chain.x, chain.x),
                weights,
                biases,
                chain.kinds,
                chain.paddings,
                chain.activations,
                1.0 if chain.alpha is None else chain.alpha,
            )
            call = graph.call_function(run, given)
        last.replace_all_uses_with(call)
        calls[last] = call
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    code = graph.python_code("self")
    space: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<{type(followed.root).__name__}.forward on fast layers>", "exec"), space)
    return space["forward"]


def _value(graph: fx.Graph, one: Any, name: str) -> Any:
    return graph.get_attr(f"{one}.{name}") if isinstance(one, str) else one


def settings(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """What a chain rests on of a module whose forward is not called any more."""
    names = [*_CONFIG, "size", "scale_factor", "mode", "value", "alpha", "negative_slope"]
    found = [(module, name, vars(module)[name]) for name in names if name in vars(module)]
    if isinstance(module, nn.Conv2d) and not _has_bias(module):
        found.append((module, "bias", None))
    return found


def run(
    x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], kinds: Sequence[str],
    paddings: Sequence[int], activations: Sequence[str], alpha: float,
) -> Tensor:  # fmt: skip
    """The layers of a chain; on what the fast layers do not take, in the operations that were there."""
    layers = zip(weights, biases, kinds, paddings, activations, strict=True)
    if torch.jit.is_tracing() or not _fits(x, weights, biases, paddings):
        for weight, bias, kind, padding, activation in layers:
            x = plain_layer(x, weight, bias, kind=kind, padding=padding, activation=activation, alpha=alpha)
        return x
    given = [bias for bias in biases if bias is not None]
    return conv_stage(x, weights, given or None, kinds=kinds, activation=activations, alpha=alpha)


def _fits(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], paddings: Sequence[int]) -> bool:
    """Whether the fast layers take what they are given."""
    sizes = [(2 * padding + 1, 2 * padding + 1) for padding in paddings]
    fits = all(tuple(weight.shape[2:]) == size for weight, size in zip(weights, sizes, strict=True))
    real = x.is_floating_point() and all(weight.is_floating_point() for weight in weights)
    known = x.device.type in ("cpu", "cuda")
    cast = known and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    alike = cast or all(weight.dtype == x.dtype for weight in weights)
    biased = sum(bias is not None for bias in biases)
    return x.dim() == 4 and fits and real and alike and known and biased in (0, len(weights))
