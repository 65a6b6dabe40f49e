"""Which tensors a followed forward changes in place, and which may share memory with them."""

from __future__ import annotations

import operator
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

_IN_PLACE = {getattr(operator, name) for name in dir(operator) if name.startswith("i") and name[1:] in dir(operator)}
_IN_PLACE |= {operator.setitem}
# results of these have memory of their own; results of all others may be views of their inputs
_FRESH_MODULES = frozenset("conv linear batchnorm normalization instancenorm activation pooling upsampling".split())
_FRESH: set[Any] = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.matmul, operator.neg, operator.pow,
    torch.cat, torch.stack, torch.add, torch.sub, torch.mul, torch.div, torch.tanh, torch.sigmoid, torch.exp,
    torch.relu, torch.matmul, torch.conv2d, F.conv2d, F.linear, F.interpolate, F.upsample, F.elu, F.relu, F.leaky_relu,
    F.silu, F.gelu, F.softplus, F.tanh, F.sigmoid, F.avg_pool2d, F.max_pool2d, F.group_norm, F.batch_norm,
    F.layer_norm, F.instance_norm, F.pad,
}  # fmt: skip


class Writes:
    """Where `graph` changes values in place.

    In place are operations named `..._`, those with `inplace=True` or `out=`, `+=` and its kind, and, to be safe, every
    module that is not torch's.
    """

    def __init__(self, graph: fx.Graph, modules: dict[str, nn.Module]) -> None:
        self.modules = modules
        self.place = {node: number for number, node in enumerate(graph.nodes)}
        self._shared: dict[fx.Node, set[fx.Node]] = {}
        targets = {node: self._targets(node) for node in graph.nodes}
        self.targets = {node: changed for node, changed in targets.items() if changed}

    def later(self, value: fx.Node, after: fx.Node) -> bool:
        """Whether the memory of `value` is changed after the node `after`."""
        aliases = self.shared(value)
        return any(
            self.place[node] > self.place[after] and not aliases.isdisjoint(self.shared(target))
            for node, targets in self.targets.items()
            for target in targets
        )

    def between(self, nodes: list[fx.Node]) -> bool:
        """Whether another node changes anything between the first and the last of `nodes`."""
        places = [self.place[node] for node in nodes]
        return any(min(places) < self.place[node] < max(places) and node not in nodes for node in self.targets)

    def shared(self, value: fx.Node) -> set[fx.Node]:
        """Nodes whose memory `value` may share, itself among them."""
        if value not in self._shared:
            self._shared[value] = {value}
            # an operation in place returns the tensor that it changed
            sources = self._targets(value) or ([] if self._is_fresh(value) else value.all_input_nodes)
            self._shared[value] |= {alias for source in sources for alias in self.shared(source)}
        return self._shared[value]

    def _is_fresh(self, node: fx.Node) -> bool:
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            home = type(module).__module__.split(".")
            return (
                home[:3] == ["torch", "nn", "modules"] and home[3] in _FRESH_MODULES and type(module) is not nn.Identity
            )
        return node.op == "call_function" and node.target in _FRESH

    def _targets(self, node: fx.Node) -> list[fx.Node]:
        first = [node.args[0]] if node.args else [node.kwargs["input"]] if "input" in node.kwargs else []
        first = [argument for argument in first if isinstance(argument, fx.Node)]
        if node.op == "call_module":
            module = self.modules[str(node.target)]
            if type(module).__module__.split(".")[0] != "torch":
                return node.all_input_nodes
            return first if getattr(module, "inplace", False) else []
        if node.op not in ("call_function", "call_method"):
            return []
        out = node.kwargs.get("out")
        if isinstance(out, fx.Node):
            return [out]
        name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
        by_name = name.endswith("_") and not name.endswith("__")
        # a flag by position may be `inplace`: any True counts
        by_flag = node.kwargs.get("inplace") is True or (
            _home(node) == F.__name__ and any(argument is True for argument in node.args)
        )
        return first if by_name or by_flag or node.target in _IN_PLACE else []


def _home(node: fx.Node) -> str:
    return getattr(node.target, "__module__", None) or ""
