"""Counts in one forward, by what each tensor goes into, the neighbours that an accelerator could join."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from . import run

Value = tuple[int, int]
_ACTIVATIONS = {"elu", "relu", "leaky_relu", "silu"}
_PARAMETERS = {
    "conv2d": "input weight bias stride padding dilation groups",
    "pad": "input pad mode value",
    "interpolate": "input size scale_factor mode",
}


def tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _values(tree: Any) -> list[Value]:
    """Each tensor with its version, so that a change in place makes another value."""
    return [(id(tensor), tensor._version) for tensor in tensors(tree)]


@dataclass(eq=False)
class _Call:
    name: str
    arguments: dict[str, Any]
    inputs: list[Value]
    outputs: list[Value]
    shape: tuple[int, ...]


class _Recorder(TorchFunctionMode):
    """Every call of a torch function that makes or changes a tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[_Call] = []
        self._alive: list[Any] = []  # or an id would be given out twice

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        inputs = _values((args, kwargs))
        result = func(*args, **kwargs)
        outputs = _values(result)
        self._alive.append((args, kwargs, result))
        if not {*outputs} <= {*inputs}:  # else it asks for a shape, or hands back what it got
            name = func.__name__.strip("_")
            arguments = dict(zip(_PARAMETERS.get(name, "").split(), args, strict=False)) | kwargs
            shape = tuple(tensors(result)[0].shape)
            self.calls.append(_Call(name, arguments, inputs, outputs, shape))
        return result


class Pairs:
    """The calls of one forward and who reads whose result."""

    def __init__(self, forward: Callable[[], Any]) -> None:
        with _Recorder() as recorder:
            result = forward()
        self.calls = recorder.calls
        self.made = {value: call for call in self.calls for value in call.outputs}
        self.readers: dict[Value, list[_Call]] = defaultdict(list)
        for call in [*self.calls, _Call("return", {}, _values(result), [], ())]:
            for value in dict.fromkeys(call.inputs):
                self.readers[value].append(call)

    def counts(self) -> dict[str, int]:
        """The numbers of pairs "up", "activation" and "norm", and of "shared" upsamplings.

        The first of a pair is read by the second alone. A shared upsampling is read by a convolution and by others.
        """
        found: Counter[str] = Counter()
        for call in self.calls:
            readers = [reader.name for reader in self.readers[call.outputs[0]]] if call.outputs else []
            if _doubles(call) and "conv2d" in readers:
                found["up" if readers == ["conv2d"] else "shared"] += 1
            elif call.name == "conv2d" and self._taken(call) and self._activation(call):
                found["activation"] += 1
            elif call.name == "group_norm" and self._activation(call) == "silu":
                found["norm"] += 1
        return {kind: found[kind] for kind in ("up", "activation", "norm", "shared")}

    def _activation(self, call: _Call) -> str | None:
        """The activation that alone reads the result, also where it is written x * sigmoid(x)."""
        readers = self.readers[call.outputs[0]]
        if len(readers) == 1 and readers[0].name in _ACTIVATIONS:
            return readers[0].name
        if [reader.name for reader in readers] == ["sigmoid", "mul"]:
            gate, product = readers
            return "silu" if self.readers[gate.outputs[0]] == [product] else None
        return None

    def _taken(self, call: _Call) -> bool:
        """Whether this is a 3x3 or 1x1 convolution with zeros around, of stride 1 or 2, without dilation or groups."""
        given: dict[str, Any] = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1} | call.arguments
        kernel = tuple(given["weight"].shape[2:])
        stride, padding, dilation = (_two(given[name]) for name in ("stride", "padding", "dilation"))
        if stride not in ((1, 1), (2, 2)) or dilation != (1, 1) or given["groups"] != 1:
            return False
        if kernel == (1, 1):
            return padding in ((0, 0), "same", "valid")
        if kernel != (3, 3):
            return False
        return padding in ((1, 1), "same") or (padding in ((0, 0), "valid") and self._zeros_before(call))

    def _zeros_before(self, call: _Call) -> bool:
        before = self.made.get(call.inputs[0])
        if before is None or before.name != "pad":
            return False
        given = before.arguments
        return given.get("mode", "constant") == "constant" and not given.get("value")


def _two(value: Any) -> Any:
    return value if isinstance(value, str) else (value, value) if isinstance(value, int) else tuple(value)


def _doubles(call: _Call) -> bool:
    given: dict[str, Any] = {"mode": "nearest"} | call.arguments
    if call.name != "interpolate" or given["mode"] not in ("nearest", "nearest-exact"):
        return False
    return call.shape[2:] == tuple(2 * side for side in given["input"].shape[2:])


def pairs(model: nn.Module, example: Any) -> dict[str, int]:
    """The counts of `Pairs` for one forward of `model`."""
    return Pairs(lambda: run(model, example)).counts()
