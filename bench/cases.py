"""The ops that are raced: random inputs of a shape, and a call of each form on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fastbegan_kernels import (
    conv2d_elu,
    conv_stage,
    equilibrium_update,
    fold,
    group_norm_silu,
    l1_reconstruction_loss,
    l1_reconstruction_loss_with_gradients,
    normalize_images,
    skip_phase_table,
    upsample_conv2d_elu,
)
from fastbegan_kernels.conv_layer import KINDS
from fastbegan_kernels.fold import fold_upsample

ON_CPU = not torch.cuda.is_available()
DEVICE = torch.device("cpu") if ON_CPU else torch.device("cuda", 0)
CAPABILITY = (0, 0) if ON_CPU else torch.cuda.get_device_capability(DEVICE)
PRECISION = "float32" if ON_CPU else "bf16" if CAPABILITY >= (8, 0) else "fp16"
DTYPE = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[PRECISION]
STAGES = {"decoder": ("same", "same", "up"), "encoder": ("same", "down")}
Form = Callable[..., Sequence[Tensor]]
Results = list[Tensor]


@dataclass(frozen=True)
class Case:
    """An op on random inputs of one shape."""

    op: str
    shape: tuple[int, int, int, int, int]  # N, C, H, W, K; H and W are the input's, also of an up-convolution
    backward: bool = False
    seed: int = 0

    @property
    def kinds(self) -> tuple[str, ...]:
        """The layers of an op; none where it has no convolutions."""
        return STAGES.get(self.op, (self.op,) if self.op in KINDS else ())

    @property
    def differentiable(self) -> int:
        """How many of the inputs want a gradient, from the first on."""
        counts = {"group_norm_silu": 3, "l1_reconstruction_loss": 2, "skip_phase_table": 2, "fold": len(network(1))}
        return 2 * len(self.kinds) + 1 if self.kinds else counts.get(self.op, 0)

    def inputs(self) -> list[Tensor]:
        """In the order in which the op takes them."""
        n, c, h, w, k = self.shape
        generator = torch.Generator(DEVICE).manual_seed(self.seed)

        def draw(*shape: int, scale: float = 1.0, dtype: torch.dtype = DTYPE) -> Tensor:
            values = (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(dtype)
            return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

        if self.kinds:
            x, weights = draw(n, c, h, w), [draw(k, c, 3, 3, scale=(9 * c) ** -0.5) for _ in self.kinds]
            return [x, *weights, *(draw(k) for _ in self.kinds)]
        if self.op == "fold":  # masters are float32 whatever they are packed to
            return [draw(outputs, inputs, 3, 3, dtype=torch.float32) for outputs, inputs, _ in network(c)]
        if self.op == "normalize_images":  # stored: more than fits into a cache
            stored = torch.randint(0, 256, (64 * n, h, w, c), dtype=torch.uint8, generator=generator, device=DEVICE)
            picked = torch.randint(0, 64 * n, (n,), generator=generator, device=DEVICE)
            return [stored, picked, torch.rand(n, generator=generator, device=DEVICE) < 0.5]
        if self.op == "equilibrium_update":
            return [draw(n, dtype=torch.float32).abs() for _ in range(2)]
        if self.op == "skip_phase_table":
            return [draw(n, c, h, w), draw(k, c, 3, 3, scale=(9 * c) ** -0.5)]
        if self.op == "group_norm_silu":
            return [draw(n, c, h, w), draw(c), draw(c)]
        pair = [draw(n, c, h, w), draw(n, c, h, w)]
        return pair if self.op == "l1_reconstruction_loss" else [*pair, draw(n, dtype=torch.float32)]

    def folded(self, inputs: list[Tensor]) -> list[Tensor]:
        """Inputs with the weights of up-convolutions folded, as a net does it once a step."""
        return [
            fold_upsample(value.detach().float()).to(DTYPE).contiguous(memory_format=torch.channels_last)
            if "up" in self.kinds[number - 1 : number]
            else value
            for number, value in enumerate(inputs)
        ]

    def unfolded(self, results: Results) -> Results:
        """Output and gradients of a form that got folded weights, with the gradients of the weights unfolded."""
        results = list(results)
        for number, kind in enumerate(self.kinds, 2):
            if kind == "up" and len(results) > 1:
                like = torch.zeros(self.shape[4], self.shape[1], 3, 3, device=DEVICE, requires_grad=True)
                (results[number],) = torch.autograd.grad(fold_upsample(like), like, results[number].float())
        return results

    def form(self, impl: str | None) -> Form:
        """The op in a tier; None: the automatic choice."""
        if kinds := self.kinds:
            count = len(kinds)
            if self.op in STAGES:
                return lambda x, *rest: [conv_stage(x, rest[:count], rest[count:], kinds=kinds, impl=impl)]
            if self.op == "up":
                return lambda x, weight, bias: [upsample_conv2d_elu(x, weight, bias, impl=impl)]
            stride = 1 if self.op == "same" else 2
            return lambda x, weight, bias: [conv2d_elu(x, weight, bias, stride=stride, impl=impl)]
        if self.op == "fold":
            packed = [kind for *_, kind in network(1)]
            return lambda *weights: fold(weights, packed, dtype=DTYPE, impl=impl)
        if self.op == "normalize_images":
            return lambda *inputs: [normalize_images(*inputs, dtype=DTYPE, impl=impl)]
        if self.op == "equilibrium_update":
            return _controller(impl)
        if self.op == "group_norm_silu":  # K of the shape is the number of groups
            return lambda x, *affine: [group_norm_silu(x, self.shape[4], *affine, impl=impl)]
        if self.op == "skip_phase_table":
            return lambda h, weight: [skip_phase_table(h, weight, impl=impl)]
        if self.op == "l1_reconstruction_loss":
            return lambda *pair: [l1_reconstruction_loss(*pair, impl=impl)]
        return lambda *inputs: _present(l1_reconstruction_loss_with_gradients(*inputs, to_target=True, impl=impl))


def _present(values: Sequence[Tensor | None]) -> Results:
    return [value for value in values if value is not None]


def _controller(impl: str | None) -> Form:
    """One step of k after another, so that a replay has something to do."""
    k, sums = torch.full((), 0.2, device=DEVICE), torch.ones(6, device=DEVICE)
    window = torch.ones(2, device=DEVICE, dtype=torch.float64)

    def run(real: Tensor, fake: Tensor) -> Results:
        equilibrium_update(real, fake, k, sums, window, gamma=0.5, lambda_k=1e-3, impl=impl)
        return [k]

    return run


def network(n: int) -> list[tuple[int, int, str]]:
    """Outputs, inputs and packed kind of the convolutions of a discriminator and a generator with skips, n filters."""
    encoder = [(n, 3, "conv")]
    for level in range(1, 5):
        encoder += [(level * n, level * n, "conv"), (min(level + 1, 4) * n, level * n, "conv")]
    decoder = [(n, n, kind) for kind in ("conv", "conv", *("up", "skip", "conv") * 3)] + [(3, n, "conv")]
    return encoder + 2 * decoder


def rotation(case: Case) -> list[list[Tensor]]:
    """Inputs in as many sets as the last cache cannot hold, and at most 32."""
    first = case.inputs()
    pictures = case.op == "normalize_images"
    read = first[0][: case.shape[0]].nbytes if pictures else sum(value.nbytes for value in first)
    sets = [first, *(replace(case, seed=seed).inputs() for seed in range(1, sets_beyond_cache(read)))]
    return [[first[0], *others[1:]] for others in sets] if pictures else sets  # the same images, other picks


def sets_beyond_cache(size: int) -> int:
    """How many sets of `size` bytes fill the last cache one and a half times; at most 32."""
    cache = 1 << 25 if ON_CPU else getattr(torch.cuda.get_device_properties(DEVICE), "L2_cache_size", 1 << 26)
    return min(32, -(-3 * cache // (2 * size)))
