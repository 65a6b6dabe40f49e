"""Finds [Upsample] -> Conv2d -> [activation] in a followed forward and puts it on the fast layers.

`find` first makes a chain of every convolution with its neighbours, then joins chains that follow each other. `put`
replaces the nodes of each chain by one call of `run`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastbegan_kernels import conv_stage, reference
from fastbegan_kernels.reference import plain_layer

from .follow import Followed, hooked
from .writes import Writes

_INTERPOLATE = "input size scale_factor mode align_corners recompute_scale_factor antialias".split()
_CONV = "input weight bias stride padding dilation groups".split()
_PAD = "input pad mode value".split()
# by function: name, parameters, and the default of alpha (None where there is no alpha)
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
# by module: name, and the attribute that is alpha
_ACTIVATION_MODULES: dict[type, tuple[str, str | None]] = {
    nn.ELU: ("elu", "alpha"),
    nn.ReLU: ("relu", None),
    nn.LeakyReLU: ("leaky_relu", "negative_slope"),
    nn.SiLU: ("silu", None),
}
# by stride and padding: two numbers where the convolution pads by itself, four where a layer before it does
_KINDS = {
    ((1, 1), (1, 1)): "same",
    ((1, 1), (1, 1, 1, 1)): "same",
    ((2, 2), (1, 1)): "down",
    ((2, 2), (1, 1, 1, 1)): "down",
    ((2, 2), (0, 1, 0, 1)): "down_end",
}
_KINDS_1X1 = {((1, 1), (0, 0)): "same", ((2, 2), (0, 0)): "down"}
_CONFIG = "stride padding dilation groups padding_mode transposed kernel_size".split()


class _NotTakenError(Exception):
    """The reason why a convolution is left."""


@dataclass
class Chain:
    """Layers that become one call. It replaces `nodes`; its value is that of the last one."""

    x: fx.Node
    nodes: list[fx.Node]
    weights: list[Any]
    """Each a node, or the path of the convolution that owns the weight."""
    biases: list[Any]
    kinds: list[str]
    paddings: list[int]
    """Rows and columns of zeros, added by the convolution, or for "down_end" by the layer before it."""
    activations: list[str]
    alpha: float | None
    """None where no activation has one."""
    places: list[str]
    modules: list[nn.Module] = field(default_factory=list)
    """Modules that the chain computes, so that their forward is no longer called."""
    words: list[str] = field(default_factory=list)
    """By place, the description in the report."""
    not_by_itself: str | None = None
    """Why this chain is dropped unless it continues an earlier one; None if it may stand by itself."""


def find(followed: Followed) -> tuple[list[Chain], dict[str, str]]:
    """The chains in the order of the forward, neighbours joined, and by place why a convolution is left."""
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
    joined = _joined(chains, writes)
    taken = {place for chain in joined for place in chain.places}
    left |= {place: chain.not_by_itself for chain in chains for place in chain.places if chain.not_by_itself}
    return joined, {place: why for place, why in left.items() if place not in taken}


def _is_convolution(node: fx.Node, modules: dict[str, nn.Module]) -> bool:
    if node.op == "call_module":
        return isinstance(modules[str(node.target)], nn.Conv2d)
    return node.op == "call_function" and node.target in (F.conv2d, torch.conv2d)


def _place(node: fx.Node) -> str:
    """The path of the module that calls the function."""
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
        values: dict[str, Any] = {name: getattr(conv, name) for name in ("stride", "padding", "dilation", "groups")}
        values |= {"input": _arguments(node, ["input"])["input"], "weight": place}
        values["bias"] = place if _has_bias(conv) else None
        window, owners = (conv.kernel_size[0], conv.kernel_size[1]), [cast(nn.Module, conv)]
        words = f"{conv.in_channels} -> {conv.out_channels}"
    else:
        values = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1} | _arguments(node, _CONV)
        window, words, owners = None, "weights made by the forward", []
    if _pair(values["dilation"]) != (1, 1) or values["groups"] != 1:
        raise _NotTakenError("it is dilated or in groups")
    if window is not None and window not in ((3, 3), (1, 1)):
        raise _NotTakenError(f"its kernel is {window[0]}x{window[1]}")
    padding = values["padding"]
    if padding == "same":
        padding = (1, 1) if window == (3, 3) else (0, 0) if window == (1, 1) else padding
    padding = (0, 0) if padding == "valid" else _pair(padding)
    if not isinstance(values["input"], fx.Node):
        raise _NotTakenError("its input is not a tensor of the forward")
    return _Convolution(
        x=values["input"],
        weight=values["weight"],
        bias=values["bias"],
        window=window,
        stride=_pair(values["stride"]),
        padding=padding,
        words=words,
        modules=owners,
    )


def _has_bias(conv: nn.Module) -> bool:
    """Looks at names only: reading a parametrized bias computes it."""
    return conv._parameters.get("bias") is not None or nn.utils.parametrize.is_parametrized(conv, "bias")


def _chain(node: fx.Node, place: str, modules: dict[str, nn.Module], writes: Writes) -> Chain:
    conv = _convolution(node, place, modules)
    x, nodes, owners = conv.x, [node], list(conv.modules)
    is_1x1 = conv.window == (1, 1)
    padding: Any = conv.padding
    padded = _zero_padding(x, modules) if padding == (0, 0) and not is_1x1 else None
    if padded:
        padding, nodes = padded.numbers, [x, node]
        x, owners = padded.x, owners + padded.owners
    kind = (_KINDS_1X1 if is_1x1 else _KINDS).get((conv.stride, padding))
    if kind is None:
        raise _NotTakenError(f"no fast layer has stride {conv.stride} and padding {padding}")
    words = [f"{'1x1' if is_1x1 else '3x3'} convolution {conv.words}"]
    words[0] += "" if kind == "same" else ", stride 2"
    left = None
    if kind == "same" and not is_1x1:
        doubled = _doubling(x, modules)
        # the backward would read the changed input; without a chain, autograd keeps the upsampled copy
        if isinstance(doubled, _Absorbed) and writes.later(doubled.x, x):
            left = "the upsampling's input is changed in place later"
        elif isinstance(doubled, _Absorbed):
            kind, nodes, words = "up", [x, *nodes], ["nearest x2", *words]
            x, owners = doubled.x, owners + doubled.owners
        else:
            left = doubled
    activation, alpha = "none", None
    user = next(iter(node.users)) if _used_once(node) else None
    after = None if user is None else _activation(user, node, modules)
    # the backward reads the activation's output, so nothing may change it in place
    if user is not None and after is not None and not writes.later(user, user):
        activation, alpha, modules_after = after
        nodes, owners = [*nodes, user], owners + modules_after
        words.append(activation)
    if activation == "none" and kind in ("same", "down"):
        left = left or "it has neither an upsampling before nor an activation behind it"
    else:
        left = None
    if padded and kind != "up" and writes.later(x, nodes[0]):
        raise _NotTakenError("the padding's input is changed in place later")
    if writes.between(nodes):
        raise _NotTakenError("a tensor is changed in place between its parts")
    return Chain(
        x,
        nodes,
        weights=[conv.weight],
        biases=[conv.bias],
        kinds=[kind],
        paddings=[0 if is_1x1 else 1],
        activations=[activation],
        alpha=alpha,
        places=[place],
        modules=owners,
        words=[", ".join(words)],
        not_by_itself=left,
    )


@dataclass
class _Absorbed:
    """A padding (its four `numbers`) or an upsampling that a chain computes: its input and its modules."""

    x: fx.Node
    owners: list[nn.Module]
    numbers: tuple[int, ...] = ()


def _used_once(node: fx.Node) -> bool:
    """Whether nothing but the chain reads this value."""
    return len(node.users) == 1


def _owner(node: fx.Node, modules: dict[str, nn.Module], kinds: tuple[type, ...]) -> nn.Module | None:
    if node.op != "call_module" or type(modules[str(node.target)]) not in kinds or hooked(modules[str(node.target)]):
        return None
    return modules[str(node.target)]


def _zero_padding(node: fx.Node, modules: dict[str, nn.Module]) -> _Absorbed | None:
    owners: list[nn.Module] = []
    if owner := _owner(node, modules, (nn.ZeroPad2d, nn.ConstantPad2d)):
        values = {"pad": owner.padding, "value": getattr(owner, "value", 0.0), "mode": "constant"}
        values["input"], owners = _arguments(node, ["input"])["input"], [owner]
    elif node.op == "call_function" and node.target is F.pad:
        values = {"mode": "constant", "value": None} | _arguments(node, _PAD)
    else:
        return None
    x, pad = values["input"], values["pad"]
    zeros = values["mode"] == "constant" and values["value"] in (None, 0)
    if not (zeros and _used_once(node) and isinstance(x, fx.Node) and isinstance(pad, list | tuple)):
        return None
    numbers = tuple(number for number in pad if isinstance(number, int))
    return _Absorbed(x, owners, numbers) if len(numbers) == len(pad) == 4 else None


def _doubling(node: fx.Node, modules: dict[str, nn.Module]) -> _Absorbed | str | None:
    """A nearest upsampling by 2; of another resizing, why it is not taken; None if `node` is no resizing."""
    if owner := _owner(node, modules, (nn.Upsample, nn.UpsamplingNearest2d)):
        values = {"size": owner.size, "scale_factor": owner.scale_factor, "mode": owner.mode}
        values["input"], owners = _arguments(node, ["input"])["input"], [owner]
    elif node.op == "call_function" and node.target in (F.interpolate, F.upsample, F.upsample_nearest):
        values = {"size": None, "scale_factor": None, "mode": "nearest"} | _arguments(node, _INTERPOLATE)
        owners = []
    else:
        return None
    if values["mode"] not in ("nearest", "nearest-exact"):
        return f"the upsampling before it is {values['mode']}"
    factor = values["scale_factor"]
    factors = factor if isinstance(factor, list | tuple) else (factor, factor)
    if values["size"] is not None or any(not isinstance(number, int | float) or number != 2 for number in factors):
        return "the upsampling before it is not by a scale_factor of 2"
    if not _used_once(node):
        return "the upsampled tensor before it is used elsewhere too"
    return _Absorbed(values["input"], owners) if isinstance(values["input"], fx.Node) else None


def _activation(
    node: fx.Node, x: fx.Node, modules: dict[str, nn.Module]
) -> tuple[str, float | None, list[nn.Module]] | None:
    """Name, alpha (None where it has none) and modules of the activation of `x` at `node`; None if it is none."""
    owners: list[nn.Module] = []
    if owner := _owner(node, modules, tuple(_ACTIVATION_MODULES)):
        (name, attribute), owners = _ACTIVATION_MODULES[type(owner)], [owner]
        alpha = None if attribute is None else getattr(owner, attribute)
    elif node.op in ("call_function", "call_method") and node.target in _ACTIVATIONS:
        name, names, alpha = _ACTIVATIONS[node.target]
        values = _arguments(node, names.split())
        alpha = values.get("alpha", values.get("negative_slope", alpha))
        if not {*names.split()} >= {*values} or values.get("input") is not x:
            return None
    else:
        return None
    if alpha is None:
        return name, None, owners
    return (name, float(alpha), owners) if isinstance(alpha, int | float) and alpha >= 0 else None


def _joined(chains: list[Chain], writes: Writes) -> list[Chain]:
    """Merge each chain into the one whose value only it reads; drop those that may not stand by themselves."""
    joined: list[Chain] = []
    for chain in chains:
        for number, before in enumerate(joined):
            if before.nodes[-1] is chain.x and _used_once(chain.x) and _may_join(before, chain, writes):
                merged = {
                    name: getattr(before, name) + getattr(chain, name)
                    for name in "nodes weights biases kinds paddings activations places modules words".split()
                }
                alpha = chain.alpha if before.alpha is None else before.alpha
                joined[number] = Chain(before.x, alpha=alpha, **merged)
                break
        else:
            if not chain.not_by_itself:
                joined.append(chain)
    return joined


def _may_join(before: Chain, after: Chain, writes: Writes) -> bool:
    """Whether one stage can compute both: it has one alpha, and biases in all layers or in none."""
    pair = (before, after)
    one_alpha = len({chain.alpha for chain in pair if chain.alpha is not None}) < 2
    # a stage runs layers with other activations one by one
    kept_apart = not {*before.activations, *after.activations} <= {*reference.FROM_OUTPUT}
    all_biased = all(None not in chain.biases for chain in pair)
    none_biased = all(chain.biases.count(None) == len(chain.biases) for chain in pair)
    unchanged = not writes.between([*before.nodes, *after.nodes])
    return one_alpha and not kept_apart and unchanged and (all_biased or none_biased)


def put(followed: Followed, chains: list[Chain]) -> Callable[..., Any]:
    """The forward with `chains` as calls of `run`: a function of the module and its arguments."""
    graph = followed.graph
    calls: dict[Any, fx.Node] = {}  # by the last node of a chain, which its call replaces
    for chain in chains:
        last = chain.nodes[-1]
        with graph.inserting_before(last):
            # an input or a computed weight may be the value of an earlier chain
            weights = [_value(graph, calls.get(source, source), "weight") for source in chain.weights]
            biases = [_value(graph, calls.get(source, source), "bias") for source in chain.biases]
            arguments = (
                calls.get(chain.x, chain.x),
                weights,
                biases,
                chain.kinds,
                chain.paddings,
                chain.activations,
                1.0 if chain.alpha is None else chain.alpha,
            )
            call = graph.call_function(run, arguments)
        last.replace_all_uses_with(call)
        calls[last] = call
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    code = graph.python_code("self")
    space: dict[str, Any] = dict(code.globals)
    exec(compile(code.src, f"<{type(followed.root).__name__}.forward on fast layers>", "exec"), space)
    return space["forward"]


def _value(graph: fx.Graph, source: Any, name: str) -> Any:
    return graph.get_attr(f"{source}.{name}") if isinstance(source, str) else source


def settings(module: nn.Module) -> list[tuple[nn.Module, str, Any]]:
    """The attributes of a module in a chain that the chain's result depends on, with their values."""
    names = [*_CONFIG, "size", "scale_factor", "mode", "value", "alpha", "negative_slope"]
    values = [(module, name, vars(module)[name]) for name in names if name in vars(module)]
    if isinstance(module, nn.Conv2d) and not _has_bias(module):
        values.append((module, "bias", None))
    return values


def run(
    x: Tensor,
    weights: Sequence[Tensor],
    biases: Sequence[Tensor | None],
    kinds: Sequence[str],
    paddings: Sequence[int],
    activations: Sequence[str],
    alpha: float,
) -> Tensor:
    """Compute a chain as one stage, or in torch's operations where the fast layers do not take the arguments."""
    layers = zip(weights, biases, kinds, paddings, activations, strict=True)
    if torch.jit.is_tracing() or not _fits(x, weights, biases, paddings):
        for weight, bias, kind, padding, activation in layers:
            x = plain_layer(x, weight, bias, kind=kind, padding=padding, activation=activation, alpha=alpha)
        return x
    present = [bias for bias in biases if bias is not None]
    return conv_stage(x, weights, present or None, kinds=kinds, activation=activations, alpha=alpha)


def _fits(x: Tensor, weights: Sequence[Tensor], biases: Sequence[Tensor | None], paddings: Sequence[int]) -> bool:
    """Whether the fast layers take these shapes, types and devices."""
    sizes = [(2 * padding + 1, 2 * padding + 1) for padding in paddings]
    sizes_fit = all(tuple(weight.shape[2:]) == size for weight, size in zip(weights, sizes, strict=True))
    floating = x.is_floating_point() and all(weight.is_floating_point() for weight in weights)
    device_fits = x.device.type in ("cpu", "cuda")
    autocast = device_fits and torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64
    one_dtype = autocast or all(weight.dtype == x.dtype for weight in weights)
    biased = sum(bias is not None for bias in biases)
    return x.dim() == 4 and sizes_fit and floating and one_dtype and device_fits and biased in (0, len(weights))
