"""Which values a followed forward changes in place, and which may share memory with them."""

from __future__ import annotations

import functools
import inspect
import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx
from torch.fx.node import map_arg

NN: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]
"""Built-in functions that stand in Dynamo's graphs."""
_IN_PLACE = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)}
_IN_PLACE |= {operator.setitem}
# results of these have memory of their own; results of all others may be views of their inputs
_FRESH: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.neg, operator.pow,
    torch.cat, torch.stack, torch.add, torch.sub, torch.mul, torch.div, torch.tanh, torch.sigmoid, torch.exp,
    torch.relu, torch.matmul, torch.conv2d, torch.conv_transpose2d, torch.bmm, torch.group_norm, NN.pad,
    NN.gelu, NN.linear, NN.softplus, F.linear, F.interpolate, F.upsample, F.elu, F.relu,
    F.leaky_relu, F.silu, F.gelu, F.softplus, F.softmax, F.tanh, F.sigmoid, F.avg_pool2d, F.max_pool2d, F.group_norm,
    F.batch_norm, F.layer_norm, F.instance_norm, F.pad,
}  # fmt: skip
_SWITCHES = {"_set_grad_enabled", "_enter_autocast", "_exit_autocast", "_enter_inference_mode", "_exit_inference_mode"}


class Writes:
    """Where `graph` changes values in place.

    In place are operations named `..._`, those with `inplace=True` or `out=`, `+=` and its kind, and, to be safe, every
    call of another graph.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self.place = {node: number for number, node in enumerate(graph.nodes)}
        self._shared: dict[fx.Node, set[fx.Node]] = {}
        targets = {node: _targets(node) for node in graph.nodes}
        self._of = targets
        self.targets = {node: changed for node, changed in targets.items() if changed}
        self._given: set[fx.Node] = set()
        for node in graph.nodes:
            if node.op in ("placeholder", "output"):
                given = [node] if node.op == "placeholder" else node.all_input_nodes
                self._given |= {alias for value in given for alias in self.shared(value)}
        self._switches = [node for node in graph.nodes if getattr(node.target, "__name__", "") in _SWITCHES]

    def later(self, value: fx.Node, after: fx.Node) -> bool:
        """Whether the memory of `value` is changed after the node `after`."""
        aliases = self.shared(value)
        return any(
            self.place[node] > self.place[after] and not aliases.isdisjoint(self.shared(target))
            for node, targets in self.targets.items()
            for target in targets
        )

    def between(self, nodes: Sequence[fx.Node]) -> bool:
        """Whether another node changes a value, or gradients or autocast, between the first and the last of `nodes`."""
        places = [self.place[node] for node in nodes]
        others = [*(node for node in self.targets if node not in nodes), *self._switches]
        return any(min(places) < self.place[node] < max(places) for node in others)

    def escapes(self, value: fx.Node) -> bool:
        """Whether who called the graph gets the memory of `value`, and may write into it."""
        return not self._given.isdisjoint(self.shared(value))

    def shared(self, value: fx.Node) -> set[fx.Node]:
        """Nodes whose memory `value` may share, itself among them."""
        if value not in self._shared:
            self._shared[value] = {value}
            # an operation in place returns the tensor that it changed
            sources = self._of[value] or ([] if value.target in _FRESH else value.all_input_nodes)
            self._shared[value] |= {alias for source in sources for alias in self.shared(source)}
        return self._shared[value]


def _targets(node: fx.Node) -> list[fx.Node]:
    if node.op not in ("call_function", "call_method"):
        return []
    if isinstance(node.target, torch._ops.HigherOrderOperator):
        return node.all_input_nodes
    if isinstance(node.target, torch._ops.OpOverload):
        return _written_by_schema(node, node.target)
    written = _nodes(node.kwargs.get("out"))
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    by_name = name.endswith("_") and not name.endswith("__")
    if by_name or _inplace(node) or node.target in _IN_PLACE:
        written += _nodes(node.args[0] if node.args else node.kwargs.get("input"))
    elif isinstance(node.target, torch._ops.OpOverloadPacket):  # which of its overloads runs is not known
        written += node.all_input_nodes
    return written


def _written_by_schema(node: fx.Node, target: torch._ops.OpOverload) -> list[fx.Node]:
    written: list[fx.Node] = []
    for number, argument in enumerate(target._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            given = node.args[number] if number < len(node.args) else node.kwargs.get(argument.name)
            written += _nodes(given)
    return written


def _nodes(value: Any) -> list[fx.Node]:
    """The nodes in an argument, which may be a list."""
    found: list[fx.Node] = []
    map_arg(value, lambda node: found.append(node))
    return found


def _inplace(node: fx.Node) -> bool:
    """Whether the argument `inplace` is given and not False."""
    given: Any = node.kwargs.get("inplace", False)
    names = _parameters(node.target) if callable(node.target) else ()
    if "inplace" in names[: len(node.args)]:
        given = node.args[names.index("inplace")]
    return given is not False


@functools.cache
def _parameters(function: Any) -> tuple[str, ...]:
    try:
        return tuple(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # built-in functions, which have no such flag
        return ()
