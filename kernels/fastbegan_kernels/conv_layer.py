"""One convolution layer and its gradients: their forms, and the ops that run the form chosen for a machine.

Forms of a layer and of its input gradient:

- `PLAIN`: the library's own operations.
- `EPILOGUE`: the library's convolution, and one Triton kernel for all that is pointwise around it.
- a `Tile` or `TmaTile`: a fused kernel.

Weights are packed (`fold`): [K, C, k, k], and [C, K, 4, 4] for kind "up". All tensors are channels_last.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import arguments, library, problems, reference, tuning
from .dispatch import allows_tf32
from .fused.conv_tiles import Tile, TmaTile, tile_named
from .library_op import library_op
from .problems import PLAIN, Form, Named, Problem, Tensors

KINDS = ("same", "down", "up")
"""The kinds that fused kernels compute; "down_end" is always the library's."""
EPILOGUE = Named("library with epilogue")
EXCHANGED, PHASES = Named("exchanged"), Named("phases")
"""Forms of a weight gradient besides PLAIN; see `library`."""
_VALUES = 1 << 24  # of the largest tensor in a check; a larger batch is checked in part


def _forward(
    form: Form,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    kind: str,
    activation: str,
    alpha: float,
) -> Tensor:
    """act(conv(x) + bias + skip): x [N, C, H, W] -> [N, K, H', W']; skip [N, 3, 3, S, S, K] with kind "up" only."""
    if isinstance(form, Tile | TmaTile):
        from .fused import conv

        return conv.forward(x, weight, bias, skip, kind=kind, activation=activation, alpha=alpha, tile=form)
    if form == EPILOGUE:
        from .fused.activation import activation as finish

        return finish(library.convolve(x, weight, None, kind), bias, skip, activation=activation, alpha=alpha)
    return library.forward(x, weight, bias, skip, kind, activation, alpha)


def _input_gradient(
    form: Form, dz: Tensor, x: Tensor, weight: Tensor, kind: str, activation: str | None, alpha: float
) -> tuple[Tensor, Tensor | None]:
    """The gradient dx at a layer's input x, from dz at its convolution's output.

    With `activation`, the one whose output x is: dx * act'(x), and its sum over pixels.
    """
    if isinstance(form, Tile | TmaTile):
        from .fused import conv

        y_prev = None if activation is None else x
        size, act = (x.shape[2], x.shape[3]), activation or "none"
        return conv.input_gradient(dz, weight, y_prev, kind=kind, size=size, activation=act, alpha=alpha, tile=form)
    if form == EPILOGUE and activation is not None:
        from .fused.activation import activation_backward

        dx = library.convolution_gradient(dz, x, weight, kind)
        return activation_backward(dx, x, activation=activation, alpha=alpha)
    return library.input_gradient(dz, x, weight, kind, activation, alpha)


def _weight_gradient(form: Form, dz: Tensor, x: Tensor, weight: Tensor, kind: str) -> Tensor:
    """The gradient of a layer's packed weight, in its shape and dtype."""
    if form == EXCHANGED:
        return library.exchanged_weight_gradient(dz, x, weight)
    return (
        library.phases_weight_gradient(dz, x, weight)
        if form == PHASES
        else library.weight_gradient(dz, x, weight, kind)
    )


@dataclass(frozen=True)
class Layer(Problem):
    """A layer's forward, or its input gradient. `x` and `weight` are the shapes of its input and packed weight."""

    kind: str
    backward: bool
    dtype: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    bias: bool = True
    skip: int = 0  # S of the phase table, 0 without one
    activation: str | None = "elu"  # backward: of the layer before, None for the first layer
    alpha: float = 1.0
    tf32: bool = False

    @property
    def name(self) -> str:
        """One line for warnings."""
        return f"{self.kind} {'input gradient' if self.backward else 'forward'} {self.dtype} {_sizes(self)}"

    def variant(self, form: Form) -> str:
        """The compiled binary that a form needs here. Sizes are run-time numbers; only their divisibility counts."""
        channels, outputs = self.weight[:2] if self.kind == "up" else self.weight[1::-1]
        if self.backward:
            channels, outputs = outputs, channels
        block = 64 if channels % 64 == 0 else 32 if channels % 32 == 0 else 16 if channels % 16 == 0 else 1
        divisible = (block, outputs % 16 == 0, channels % 8 == 0 == outputs % 8)
        mode = ("backward" if self.backward else "forward", self.dtype, "tf32" if self.tf32 else "exact")
        facts = (self.kind, *mode, self.weight[2], self.activation, self.bias, self.skip, *divisible, form.name)
        return " ".join(map(str, facts))

    def forms(self, device: torch.device, impl: str) -> list[Form]:
        """The library's convolution with our epilogue, and tiles.

        No tile computes the input gradient of a 1x1 convolution of stride 2, even where "fused" is forced.
        """
        if self.backward and self.kind == "down" and self.weight[2] != 3:
            return [EPILOGUE]
        tiles: list[Form] = [] if impl == "algebraic" or self.kind == "down_end" else self._tiles(device)
        if torch.are_deterministic_algorithms_enabled():
            tiles = tiles[:1]  # two measurements may disagree on the fastest
        return tiles if impl == "fused" else [EPILOGUE, *tiles]

    def _tiles(self, device: torch.device) -> list[Form]:
        if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
            return []  # no asynchronous copies, and Triton does not support these GPUs
        from .fused import conv

        product = conv.product_of(self.x, self.weight, self.kind, self.backward, self.skip > 0)
        return [*conv.layer_tiles(product, problems.dtype_named(self.dtype), device)]

    def form_named(self, name: str) -> Form:
        """The form with a name."""
        return Named(name) if name in (PLAIN.name, EPILOGUE.name) else tile_named(name)

    def repeats(self, form: Form) -> bool:
        """Our kernels add in a fixed order; the library's convolutions may not."""
        return isinstance(form, Tile | TmaTile)

    def tensors(self, device: torch.device, *, whole: bool = True) -> Tensors:
        """Random inputs with outputs of about 1. Without `whole`, only as many samples as a check needs."""
        generator = torch.Generator(device).manual_seed(0)

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            values = values.to(problems.dtype_named(self.dtype) if dtype is None else dtype)
            return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

        _, channels, height, width = self.x
        batch, outputs, out_h, out_w = _output(self, whole)
        fan = (4 if self.kind == "up" else self.weight[2] ** 2) * (outputs if self.backward else channels)
        x = draw(batch, channels, height, width)
        if self.backward and self.activation is not None:
            x = reference.activate(x, self.activation, self.alpha)
        return {
            "x": x,
            "weight": draw(*self.weight, scale=fan**-0.5),
            "bias": draw(outputs, dtype=torch.float32) if self.bias and not self.backward else None,
            "skip": draw(batch, 3, 3, self.skip, self.skip, outputs) if self.skip and not self.backward else None,
            "dz": draw(batch, outputs, out_h, out_w) if self.backward else None,
        }

    def run(self, form: Form, tensors: Tensors) -> list[Tensor]:
        """The output, or the input gradient and, with an activation, its sum over pixels."""
        x, weight, dz = tensors["x"], tensors["weight"], tensors["dz"]
        assert x is not None and weight is not None
        if dz is None:
            assert self.activation is not None
            rest = (tensors["bias"], tensors["skip"], self.kind, self.activation, self.alpha)
            return [_forward(form, x, weight, *rest)]
        gradients = _input_gradient(form, dz, x, weight, self.kind, self.activation, self.alpha)
        return [value for value in gradients if value is not None]


@dataclass(frozen=True)
class WeightGradient(Problem):
    """A layer's weight gradient by the library, in several ways. `x` and `weight` are as in `Layer`."""

    kind: str
    dtype: str
    x: tuple[int, ...]
    weight: tuple[int, ...]
    tf32: bool = False
    tried_apart = False

    @property
    def name(self) -> str:
        """One line for warnings."""
        return f"{self.kind} weight gradient {self.dtype} {_sizes(self)}"

    def forms(self, device: torch.device, impl: str) -> list[Form]:
        """All ways, the plain one first; none where nothing is to be timed."""
        other = {"same": EXCHANGED, "up": PHASES}.get(self.kind)
        single = self.weight[2] == 1 or device.type != "cuda" or torch.are_deterministic_algorithms_enabled()
        return [] if other is None or single else [PLAIN, other]

    def repeats(self, form: Form) -> bool:
        """The library's sums may not have a fixed order."""
        return False

    def tensors(self, device: torch.device, *, whole: bool = True) -> Tensors:
        """Random inputs with results of about 1. Without `whole`, only as many samples as a check needs."""
        generator = torch.Generator(device).manual_seed(0)
        batch, outputs, out_h, out_w = _output(self, whole)

        def draw(*shape: int, scale: float = 1.0) -> Tensor:
            values = torch.randn(shape, generator=generator, device=device) * scale
            return values.to(problems.dtype_named(self.dtype)).contiguous(memory_format=torch.channels_last)

        x = draw(batch, *self.x[1:])
        dz = draw(batch, outputs, out_h, out_w, scale=max(1, batch * out_h * out_w) ** -0.5)
        return {"x": x, "dz": dz, "weight": torch.empty_like(draw(*self.weight))}

    def run(self, form: Form, tensors: Tensors) -> list[Tensor]:
        """The gradient."""
        x, dz, weight = tensors["x"], tensors["dz"], tensors["weight"]
        assert x is not None and dz is not None and weight is not None
        return [_weight_gradient(form, dz, x, weight, self.kind)]


def _output(problem: Layer | WeightGradient, whole: bool) -> tuple[int, int, int, int]:
    """The shape of a layer's output. Without `whole`, only as many samples as a check needs."""
    batch, channels, height, width = problem.x
    outputs = problem.weight[1 if problem.kind == "up" else 0]
    out_h, out_w = arguments.output_size((height, width), problem.kind)
    if not whole:
        batch = max(1, min(batch, _VALUES // max(channels * height * width, outputs * out_h * out_w)))
    return batch, outputs, out_h, out_w


def _sizes(problem: Layer | WeightGradient) -> str:
    outputs = problem.weight[1 if problem.kind == "up" else 0]
    return f"{problem.x[1]} to {outputs} channels, {problem.x[0]} of {problem.x[2:]}"


def _layer_like(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    kind: str,
    activation: str,
    alpha: float,
    impl: str,
) -> Tensor:
    shape = (x.shape[0], weight.shape[1 if kind == "up" else 0], *arguments.output_size(x.shape[2:], kind))
    return torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)


@library_op(_layer_like)
def layer(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    skip: Tensor | None,
    kind: str,
    activation: str,
    alpha: float,
    impl: str,
) -> Tensor:
    """act(conv(x) + bias + skip) by the form for this machine; `impl` is from `op_impl`."""
    facts = {"bias": bias is not None, "skip": 0 if skip is None else skip.shape[3]}
    form = _form(x, weight, impl, kind=kind, backward=False, activation=activation, alpha=alpha, **facts)
    return _forward(form, x, weight, bias, skip, kind, activation, alpha)


def _gradient_like(
    dz: Tensor, x: Tensor, weight: Tensor, kind: str, activation: str | None, alpha: float, impl: str
) -> tuple[Tensor, Tensor]:
    sums = x.new_empty(0 if activation is None else x.shape[1], dtype=torch.promote_types(x.dtype, torch.float32))
    return torch.empty_like(x, memory_format=torch.channels_last), sums


@library_op(_gradient_like)
def layer_input_gradient(
    dz: Tensor, x: Tensor, weight: Tensor, kind: str, activation: str | None, alpha: float, impl: str
) -> tuple[Tensor, Tensor]:
    """`_input_gradient` by the form for this machine. Without `activation` the second result is empty."""
    form = _form(x, weight, impl, kind=kind, backward=True, activation=activation, alpha=alpha, bias=False)
    dx, sums = _input_gradient(form, dz, x, weight, kind, activation, alpha)
    if sums is None:
        sums = x.new_empty(0, dtype=torch.promote_types(x.dtype, torch.float32))
    return dx, sums


def _weight_gradient_like(dz: Tensor, x: Tensor, weight: Tensor, kind: str, impl: str) -> Tensor:
    return torch.empty_like(weight, memory_format=torch.channels_last)


@library_op(_weight_gradient_like)
def layer_weight_gradient(dz: Tensor, x: Tensor, weight: Tensor, kind: str, impl: str) -> Tensor:
    """The gradient of a layer's packed weight by the form for this machine."""
    form: Form = PLAIN
    if x.numel() and dz.numel():
        problem = WeightGradient(kind, problems.NAMES[x.dtype], tuple(x.shape), tuple(weight.shape), _tf32(x))
        form = tuning.form(problem, x.device, "algebraic" if impl == "fused" else impl)
    return _weight_gradient(form, dz, x, weight, kind)


def _form(x: Tensor, weight: Tensor, impl: str, **facts: Any) -> Form:
    """The form for this machine of a layer at input x; `facts` are the other fields of `Layer`."""
    if not x.numel():
        return PLAIN
    shapes = {"x": tuple(x.shape), "weight": tuple(weight.shape)}
    return tuning.form(Layer(dtype=problems.NAMES[x.dtype], tf32=_tf32(x), **shapes, **facts), x.device, impl)


def _tf32(x: Tensor) -> bool:
    """Whether products of x may round to TF32."""
    return x.dtype == torch.float32 and x.is_cuda and allows_tf32()
