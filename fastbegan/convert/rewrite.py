"""Puts the fast layers into a followed graph and notes in the report what it took."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from . import calls, chains, gains, regions
from .chains import Chain
from .report import Report
from .writes import Writes

_CHECKPOINTS = ("tag_activation_checkpoint", "wrap_activation_checkpoint")


def rewrite(module: fx.GraphModule, owners: dict[fx.Node, str], report: Report, *, compiled: bool) -> int:
    """Replace each chain that pays in a graph, and in the parts of it that are recomputed in the backward.

    Args:
        module: Dynamo's graph; it is changed.
        owners: For inputs that are parameters, the paths of their modules.
        report: Gets what was taken and what was left.
        compiled: Whether a compiler gets the graph, which treats recomputed parts itself.

    Returns:
        The number of calls that replace something.
    """
    graph = module.graph
    inner = 0
    for node in graph.nodes:
        if getattr(node.target, "__name__", "") in _CHECKPOINTS:
            inner += _enter(module, node, owners, report, compiled=compiled)
    writes = Writes(graph)
    found, left = chains.find(graph, owners, writes)
    why = dict(left)
    taken = _taken(graph, found, writes, why)
    regions.lay_out(graph, set(_put(graph, taken, writes)))
    _note(found, taken, why, report)
    graph.lint()
    module.recompile()
    return inner + len(taken)


def _enter(module: fx.GraphModule, node: fx.Node, owners: dict[fx.Node, str], report: Report, *, compiled: bool) -> int:
    body, *inputs = node.args
    assert isinstance(body, fx.Node)
    inner = module.get_submodule(str(body.target))
    assert isinstance(inner, fx.GraphModule)
    placeholders = [place for place in inner.graph.nodes if place.op == "placeholder"]
    inner_owners = {
        place: owners[given]
        for place, given in zip(placeholders, inputs, strict=True)
        if isinstance(given, fx.Node) and given in owners
    }
    taken = rewrite(inner, inner_owners, report, compiled=compiled)
    if not compiled:
        node.target = calls.recompute
        if "_checkpoint_context_fn" in inner.meta:
            node.kwargs = {**node.kwargs, "context_fn": inner.meta["_checkpoint_context_fn"]}
    return taken


def _taken(graph: fx.Graph, found: list[Chain], writes: Writes, why: dict[str, str]) -> list[Chain]:
    """The chains that pay, joined. A convolution to an image pays in channels_last only."""
    arrives: dict[fx.Node, bool] = {}  # by node: whether its value will be channels_last
    nodes = iter(graph.nodes)

    def is_last(value: fx.Node) -> bool:
        while value not in arrives:
            node = next(nodes)
            maps = regions.maps(node)
            kept = bool(maps) and regions.keeps_format(node) and all(arrives[x] for x in maps)
            arrives.setdefault(node, regions.is_last(node) or kept)
        return arrives[value]

    def pays(chain: Chain) -> bool:
        reason = gains.why_left(chain, is_last(chain.x))
        if reason is None:
            arrives[chain.value] = True
        else:
            why.setdefault(chain.places[0], reason)
        return reason is None

    return chains.joined(found, pays, gains.pays_by_itself, writes)


def _note(found: list[Chain], taken: list[Chain], why: dict[str, str], report: Report) -> None:
    for chain in taken:
        for place, words in zip(chain.places, chain.words, strict=True):
            report.take(place, words)
    for chain in found:
        place = chain.places[0]
        if not any(place in other.places for other in taken):
            report.leave(place, why.get(place) or chain.not_by_itself or "")
        for kind, pair in chain.pairs:
            report.meet(kind, [pair], any(chain.value in other.nodes for other in taken))
    for place, reason in why.items():
        report.leave(place, reason)


def _put(graph: fx.Graph, taken: list[Chain], writes: Writes) -> list[fx.Node]:
    """Replace the nodes of each chain by one call."""
    values: dict[Any, fx.Node] = {}  # by the last node of a chain, which its call replaces
    calls_made: list[fx.Node] = []
    for chain in taken:
        differentiated = (value := chains.example(chain.value)) is not None and value.requires_grad
        if differentiated and chain.kinds[0] == "up" and writes.escapes(chain.x):
            # others may write into it; torch keeps the upsampled copy in its place
            with graph.inserting_before(chain.nodes[0]):
                chain.x = _copy(graph, values.get(chain.x, chain.x))
        with graph.inserting_before(chain.value):
            # an input or a computed weight may be the value of an earlier chain
            x = values.get(chain.x, chain.x)
            weights = [values.get(weight, weight) for weight in chain.weights]
            biases = [values.get(bias, bias) for bias in chain.biases]
            if chain.kinds == ["norm"]:
                options: tuple[Any, ...] = (chain.groups, weights[0], biases[0], chain.eps, chain.activations[0])
                call = graph.call_function(calls.norm, (x, *options))
            else:
                layers: tuple[Any, ...] = (weights, biases, chain.kinds, chain.paddings, chain.activations)
                alpha, least = 1.0 if chain.alpha is None else chain.alpha, gains.least_at_run_time(chain)
                call = graph.call_function(calls.stage, (x, *layers, alpha, least))
        call.meta = {"example_value": chain.value.meta.get("example_value")}
        result = call
        if differentiated and chain.activations[-1] in ("elu", "leaky_relu") and writes.escapes(chain.value):
            # others may write into it, and the backward needs it; torch keeps the activation's input in its place
            with graph.inserting_after(call):
                result = _copy(graph, call)
        chain.value.replace_all_uses_with(result)
        values[chain.value] = result
        calls_made.append(call)
        for node in reversed(chain.nodes):
            graph.erase_node(node)
    return calls_made


def _copy(graph: fx.Graph, value: fx.Node) -> fx.Node:
    copied = graph.call_method("clone", (value,))
    copied.meta = {"example_value": value.meta.get("example_value")}
    return copied


def run(module: fx.GraphModule, inputs: list[Any], *, compiled: bool) -> Callable[..., Any]:
    """What Dynamo calls from now on: the graph as it is, or what Inductor makes of it."""
    if not compiled:
        return module.forward
    return torch._inductor.compile(module, inputs)  # pyright: ignore[reportReturnType]
