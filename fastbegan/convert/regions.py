"""Memory formats between fast layers.

At its borders a fast layer keeps to the rule of nn.Conv2d: contiguous tensors stay contiguous, at the price of a copy.
Between fast layers that price is not paid. A region is a set of operations that keep channels_last as it is. `lay_out`
finds the largest, and converts on the edges that enter or leave it.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from . import calls
from .chains import CONVOLUTIONS, example
from .writes import NN, Writes

_POINTWISE: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.iadd, operator.imul,
    torch.add, torch.sub, torch.mul, torch.div, torch.tanh, torch.sigmoid, torch.relu, torch.clamp,
    F.elu, F.relu, F.leaky_relu, F.silu, F.gelu, F.tanh, F.sigmoid, F.softplus, F.hardtanh, F.mish, F.relu6,
    NN.gelu, NN.softplus, "relu", "relu_", "tanh", "sigmoid", "clamp", "add", "mul", "add_", "mul_", "clone",
}  # fmt: skip
# BatchNorm is none of these: on a CPU torch computes it less exactly in channels_last
_SPATIAL: set[Any] = {*CONVOLUTIONS, F.avg_pool2d, F.max_pool2d, torch.max_pool2d}
_JOINS = (torch.cat,)


def lay_out(graph: fx.Graph, fast: set[fx.Node]) -> None:
    """Keep the values between `fast` nodes, and what is pointwise there, in channels_last."""
    writes = Writes(graph)
    inside = _inside(graph, fast, writes)
    for node in [node for node in graph.nodes if node in inside]:
        if node in fast:
            # where all inputs and all outputs are outside, the layer itself keeps the formats
            borders = [x for x in maps(node)[:1] if x not in inside]
            if borders and any(user in inside for user in node.users) and not is_last(borders[0]):
                with graph.inserting_before(node):
                    x = _call(graph, calls.enter, borders[0])
                node.replace_input_with(borders[0], x)
        outside = [user for user in node.users if user not in inside]
        was_entered = any(x.target is calls.enter or x in inside for x in maps(node))
        if outside and was_entered and not is_last(node):
            with graph.inserting_after(node):
                y = _call(graph, calls.leave, node)
            for user in outside:
                user.replace_input_with(node, y)


def _call(graph: fx.Graph, function: Any, x: fx.Node) -> fx.Node:
    call = graph.call_function(function, (x,))
    call.meta = {"example_value": x.meta.get("example_value")}
    return call


def _inside(graph: fx.Graph, fast: set[fx.Node], writes: Writes) -> set[fx.Node]:
    """The largest set of nodes that take all maps from it, or are fast, and give some value to it, or are fast."""
    inside = fast | {node for node in graph.nodes if keeps_format(node)}
    written = {alias for targets in writes.targets.values() for value in targets for alias in writes.shared(value)}
    # a copy at the border would part a value from its aliases
    inside = {node for node in inside if node not in written}
    while True:
        kept = {
            node
            for node in inside
            if node in fast
            or (all(x in inside for x in maps(node)) and any(user in inside for user in node.users) and maps(node))
        }
        if kept == inside:
            return inside
        inside = kept


def maps(node: fx.Node) -> list[fx.Node]:
    """Those inputs [N, C, H, W] of more than one pixel; a convolution's weight is none."""
    candidates = node.all_input_nodes
    if node.target in (*CONVOLUTIONS, calls.stage, calls.norm):
        candidates = [x for x in node.args[:1] if isinstance(x, fx.Node)]
    values = [(x, example(x)) for x in candidates]
    return [x for x, value in values if value is not None and value.dim() == 4 and value.shape[2:] != (1, 1)]


def keeps_format(node: fx.Node) -> bool:
    """Whether an operation gives channels_last for channels_last, at no loss."""
    value = example(node)
    if value is None or value.dim() != 4 or node.op not in ("call_function", "call_method"):
        return False
    if value.shape[1] == 1:  # both formats fit, and torch begins anew behind it
        return False
    if node.target in _JOINS:
        dim = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
        return dim in (1, -3)
    if node.target in _SPATIAL:
        return True
    return node.target in _POINTWISE and all(_fits(example(x), value) for x in node.all_input_nodes)


def _fits(x: Tensor | None, value: Tensor) -> bool:
    """Whether an operand has the value's shape, or does not decide on its format."""
    return x is None or x.shape == value.shape or x.dim() == 0 or (x.dim() in (3, 4) and x.shape[-2:] == (1, 1))


def is_last(node: fx.Node) -> bool:
    """Whether the value would be channels_last without us."""
    value = example(node)
    return value is not None and value.is_contiguous(memory_format=torch.channels_last)
