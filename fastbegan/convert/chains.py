"""Finds [nearest x2] -> conv2d -> [activation] and GroupNorm -> SiLU in a graph of torch's functions.

The graph is Dynamo's: modules are resolved into functions, and every value has an example with shape, dtype and
strides. `find` makes a chain of each convolution with its neighbours, and of each GroupNorm; `joined` merges chains
that follow each other.
"""

from __future__ import annotations

import operator
import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fastbegan_kernels import arguments

from .writes import NN, Writes

_INTERPOLATE = "input size scale_factor mode align_corners recompute_scale_factor antialias".split()
_CONV = "input weight bias stride padding dilation groups".split()
_PAD = "input pad mode value".split()
_NORM = "input num_groups weight bias eps".split()
CONVOLUTIONS = (torch.conv2d, F.conv2d)
_OTHERS = {torch.conv_transpose2d: "a transposed convolution"}
_NORMS = (F.group_norm, torch.group_norm)
_PADS = (F.pad, NN.pad)
_RESIZES = (F.interpolate, F.upsample, F.upsample_nearest)
_SIGMOIDS = (torch.sigmoid, F.sigmoid, "sigmoid")
_PRODUCTS = (operator.mul, torch.mul, "mul")
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
# by stride and padding: two numbers where the convolution pads by itself, four where a layer before it does
_KINDS = {
    ((1, 1), (1, 1)): "same",
    ((1, 1), (1, 1, 1, 1)): "same",
    ((2, 2), (1, 1)): "down",
    ((2, 2), (1, 1, 1, 1)): "down",
    ((2, 2), (0, 1, 0, 1)): "down_end",
}
_KINDS_1X1 = {((1, 1), (0, 0)): "same", ((2, 2), (0, 0)): "down"}
_ROOT = re.compile(r"^L\['\w+'\](\[\d+\])?\.?")  # in "L['self'].decoder.conv"
_NO_NEIGHBOUR = "it has neither an upsampling before nor an activation behind it"


class _NotTakenError(Exception):
    """The reason why a layer is left."""


@dataclass
class Chain:
    """Layers that become one call. It replaces `nodes`; its value is that of the last one.

    Convolutions have one entry in each list per layer. A GroupNorm has the kind "norm", its groups and its epsilon.
    """

    x: fx.Node
    nodes: list[fx.Node]
    weights: list[fx.Node | None]
    biases: list[fx.Node | None]
    kinds: list[str]
    activations: list[str]
    places: list[str]
    words: list[str]
    """By place, the description in the report."""
    pairs: list[tuple[str, str]] = field(default_factory=list)
    """Kind (a key of `report.PAIRS`) and place of each pair of operations that the chain joins."""
    paddings: list[int] = field(default_factory=list)
    """Rows and columns of zeros, added by the convolution, or for "down_end" by the layer before it."""
    alpha: float | None = None
    """None where no activation has one."""
    groups: int = 0
    eps: float = 0.0
    not_by_itself: str | None = None
    """Why this chain is dropped unless it continues an earlier one; None if it may stand by itself."""

    @property
    def value(self) -> fx.Node:
        """The node whose value the chain computes."""
        return self.nodes[-1]


def find(graph: fx.Graph, owners: dict[fx.Node, str], writes: Writes) -> tuple[list[Chain], dict[str, str]]:
    """The chains of single layers in the order of the graph, and by place why a layer is left.

    `owners` maps inputs that are parameters to the paths of their modules.
    """
    chains: list[Chain] = []
    left: dict[str, str] = {}
    calls: Counter[str] = Counter()
    for node in graph.nodes:
        if node.op != "call_function" or node.target not in (*CONVOLUTIONS, *_OTHERS, *_NORMS):
            continue
        place = _place(node, owners)
        calls[place] += 1
        again = f"{place}, call {calls[place]}" if calls[place] > 1 else place
        try:
            if node.target in _OTHERS:
                raise _NotTakenError(_OTHERS[node.target])
            make = _norm if node.target in _NORMS else _layer
            chain = make(node, place, writes)
            chain.pairs = [(kind, again) for kind, _ in chain.pairs]
            chains.append(chain)
        except _NotTakenError as error:
            left[place] = str(error)
    return chains, left


def example(node: fx.Node) -> Tensor | None:
    """The fake tensor that stands for a node's value."""
    value = node.meta.get("example_value")
    return value if isinstance(value, Tensor) else None


def _shape(node: fx.Node) -> tuple[Any, ...]:
    value = example(node)
    return () if value is None else tuple(value.shape)


def _place(node: fx.Node, owners: dict[fx.Node, str]) -> str:
    """The path of the module that owns the weight, else of the module that calls the function."""
    weight = _arguments(node, _NORM if node.target in _NORMS else _CONV).get("weight")
    if weight in owners:
        return owners[weight]
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = _ROOT.sub("", stack[-1][0]).replace("_modules['", "").replace("']", "") if stack else ""
    return path or node.name


def _arguments(node: fx.Node, names: Sequence[str]) -> dict[str, Any]:
    return dict(zip(names, node.args, strict=False)) | dict(node.kwargs)


def _pair(value: Any) -> Any:
    return (value, value) if isinstance(value, int) else tuple(value) if isinstance(value, list | tuple) else value


def _layer(node: fx.Node, place: str, writes: Writes) -> Chain:
    values = {"bias": None, "stride": 1, "padding": 0, "dilation": 1, "groups": 1} | _arguments(node, _CONV)
    x, weight, window = values["input"], values["weight"], _shape(values["weight"])[2:]
    if _pair(values["dilation"]) != (1, 1) or values["groups"] != 1:
        raise _NotTakenError("it is dilated or in groups")
    if window not in ((3, 3), (1, 1)):
        raise _NotTakenError(f"its kernel is {'x'.join(map(str, window))}")
    if len(_shape(x)) != 4:
        raise _NotTakenError("its input has no batch")
    is_1x1, stride, nodes = window == (1, 1), _pair(values["stride"]), [node]
    padding = values["padding"]
    padding = (window[0] // 2, window[1] // 2) if padding == "same" else (0, 0) if padding == "valid" else padding
    padding = _pair(padding)
    padded = _zero_padding(x) if padding == (0, 0) and not is_1x1 else None
    if padded is not None:
        (x, padding), nodes = padded, [x, node]
    kinds: dict[Any, str] = _KINDS_1X1 if is_1x1 else _KINDS
    kind = kinds.get((stride, padding))
    if kind is None:
        other = x.target in _PADS and _arguments(x, _PAD).get("mode", "constant")
        why = f"no fast layer has stride {stride} and padding {padding}"
        raise _NotTakenError(f"its padding is {other}" if other and other != "constant" else why)
    outputs, inputs = _shape(weight)[:2]
    step = "" if kind == "same" else ", stride 2"
    words = [f"{'1x1' if is_1x1 else '3x3'} convolution {inputs} -> {outputs}{step}"]
    pairs: list[tuple[str, str]] = []
    left: str | None = _NO_NEIGHBOUR
    if kind == "same" and not is_1x1 and (doubled := _doubling(x)) is not None:
        # the backward would read the changed input; without a chain, autograd keeps the upsampled copy
        if isinstance(doubled, str):
            left = doubled
        elif writes.later(doubled, x):
            left = "the upsampling's input is changed in place later"
        elif writes.between([x, *nodes]):
            left = "a tensor is changed, or gradients are switched, between the upsampling and it"
        else:
            kind, nodes, words, x = "up", [x, *nodes], ["nearest x2", *words], doubled
            pairs.append(("up", place))
    activation, alpha = "none", None
    after = _activation(node, writes)
    # the backward reads the activation's output, so nothing in the graph may change it in place
    overwritten = after is not None and writes.later(after.nodes[-1], after.nodes[-1])
    if after is not None and not overwritten and not writes.between([*nodes, *after.nodes]):
        activation, alpha = after.name, after.alpha
        nodes = [*nodes, *after.nodes]
        words.append(activation)
        pairs.append(("activation", place))
    if kind in ("up", "down_end") or activation != "none":
        left = None
    if padded and kind != "up" and writes.later(x, nodes[0]):
        raise _NotTakenError("the padding's input is changed in place later")
    if writes.between(nodes):
        raise _NotTakenError("a tensor is changed in place between its parts")
    return Chain(
        x,
        nodes,
        weights=[weight],
        biases=[values["bias"]],
        kinds=[kind],
        paddings=[0 if is_1x1 else 1],
        activations=[activation],
        alpha=alpha,
        places=[place],
        words=[", ".join(words)],
        pairs=pairs,
        not_by_itself=left,
    )


def _norm(node: fx.Node, place: str, writes: Writes) -> Chain:
    values = {"weight": None, "bias": None, "eps": 1e-5} | _arguments(node, _NORM)
    x, groups, eps = values["input"], values["num_groups"], values["eps"]
    shape = _shape(x)
    if len(shape) != 4:
        raise _NotTakenError("its input is not [N, C, H, W]")
    if not isinstance(groups, int) or not isinstance(eps, int | float) or eps <= 0:
        raise _NotTakenError(f"its epsilon is {eps}" if isinstance(groups, int) else "its groups are not constant")
    nodes, activation, pairs = [node], "none", []
    after = _activation(node, writes)
    if after is not None and after.name == "silu" and not writes.between([node, *after.nodes]):
        nodes, activation, pairs = [node, *after.nodes], "silu", [("norm", place)]
    words = f"GroupNorm of {groups} groups, {shape[1]} channels" + (", silu" if activation == "silu" else "")
    return Chain(
        x,
        nodes,
        weights=[values["weight"]],
        biases=[values["bias"]],
        kinds=["norm"],
        activations=[activation],
        places=[place],
        words=[words],
        pairs=pairs,
        groups=groups,
        eps=float(eps),
        # the op keeps its input for the backward, as torch's own does
        not_by_itself=None,
    )


def _used_once(node: fx.Node) -> bool:
    """Whether nothing but the chain reads this value."""
    return len(node.users) == 1


def _zero_padding(node: fx.Node) -> tuple[fx.Node, tuple[int, ...]] | None:
    """Input and four numbers of a padding by zeros that only the convolution reads."""
    if node.target not in _PADS:
        return None
    values = {"mode": "constant", "value": None} | _arguments(node, _PAD)
    x, numbers = values["input"], values["pad"]
    zeros = values["mode"] == "constant" and values["value"] in (None, 0)
    if not (zeros and _used_once(node) and isinstance(x, fx.Node) and isinstance(numbers, list | tuple)):
        return None
    whole = all(isinstance(number, int) for number in numbers)
    return (x, tuple(numbers)) if whole and len(numbers) == 4 else None


def _doubling(node: fx.Node) -> fx.Node | str | None:
    """The input of a nearest upsampling by 2; of another resizing, why it is not taken; None if it is no resizing."""
    if node.target not in _RESIZES:
        return None
    values = {"size": None, "scale_factor": None, "mode": "nearest"} | _arguments(node, _INTERPOLATE)
    if values["mode"] not in ("nearest", "nearest-exact"):
        return f"the upsampling before it is {values['mode']}"
    x, factor = values["input"], values["scale_factor"]
    factors = factor if isinstance(factor, list | tuple) else (factor, factor)
    doubles = all(isinstance(number, int | float) and number == 2 for number in factors)
    if values["size"] is not None:
        sizes = [*_shape(x)[2:], *_shape(node)[2:]]
        doubles = all(isinstance(size, int) for size in sizes) and sizes[2:] == [2 * size for size in sizes[:2]]
    if not doubles:
        return "the upsampling before it is not by a factor of 2"
    return x if _used_once(node) else "the upsampled tensor before it is used elsewhere too"


@dataclass
class _Activation:
    name: str
    alpha: float | None
    nodes: list[fx.Node]


def _activation(x: fx.Node, writes: Writes) -> _Activation | None:
    """The activation that alone reads `x`; None if there is none of ours."""
    users = list(x.users)
    if len(users) == 2:
        return _swish(x, users, writes)
    if len(users) != 1 or users[0].op not in ("call_function", "call_method") or users[0].target not in _ACTIVATIONS:
        return None
    name, names, alpha = _ACTIVATIONS[users[0].target]
    values = _arguments(users[0], names.split())
    alpha = values.get("alpha", values.get("negative_slope", alpha))
    if not {*names.split()} >= {*values} or values.get("input") is not x:
        return None
    if alpha is None:
        return _Activation(name, None, users)
    return _Activation(name, float(alpha), users) if isinstance(alpha, int | float) and alpha >= 0 else None


def _swish(x: fx.Node, users: list[fx.Node], writes: Writes) -> _Activation | None:
    """x * sigmoid(x), where both read the same value."""
    sigmoid, product = users if users[0].target in _SIGMOIDS else reversed(users)
    is_swish = (
        sigmoid.target in _SIGMOIDS
        and product.target in _PRODUCTS
        and not product.kwargs
        and (sigmoid.args, sigmoid.kwargs) == ((x,), {})
        and set(product.args) == {x, sigmoid}
        and _used_once(sigmoid)
        and not writes.between([x, sigmoid, product])
    )
    return _Activation("silu", None, [sigmoid, product]) if is_swish else None


def joined(
    chains: Sequence[Chain], taken: Callable[[Chain], bool], by_itself: Callable[[Chain], bool], writes: Writes
) -> list[Chain]:
    """The taken chains, each merged into the one whose value only it reads.

    `by_itself` tells of a convolution without neighbours whether it may be taken all the same.
    """
    merged: list[Chain] = []
    for chain in chains:
        before = next((before for before in merged if before.value is chain.x), None)
        if before is not None and _used_once(chain.x) and _may_join(before, chain, writes) and taken(chain):
            for name in "nodes weights biases kinds paddings activations places words pairs".split():
                getattr(before, name).extend(getattr(chain, name))
            before.alpha = chain.alpha if before.alpha is None else before.alpha
        elif (chain.not_by_itself is None or by_itself(chain)) and taken(chain):
            merged.append(chain)
    return merged


def _may_join(before: Chain, after: Chain, writes: Writes) -> bool:
    """Whether one stage can compute both: it has one alpha, and biases in all layers or in none."""
    pair = (before, after)
    if "norm" in (*before.kinds, *after.kinds):
        return False
    one_alpha = len({chain.alpha for chain in pair if chain.alpha is not None}) < 2
    # a stage runs layers with other activations one by one
    kept_apart = not {*before.activations, *after.activations} <= {*arguments.FROM_OUTPUT}
    all_biased = all(None not in chain.biases for chain in pair)
    none_biased = all(chain.biases.count(None) == len(chain.biases) for chain in pair)
    unchanged = not writes.between([*before.nodes, *after.nodes]) and _shape(before.value)[1] != 1  # torch's formats
    return one_alpha and not kept_apart and unchanged and (all_biased or none_biased)
