"""The allowed distance of a kernel from float64, and its random inputs.

The largest error may be twice that of PyTorch's own op in the same dtype, plus 1e-6; four times for up-convolutions in
half precision, whose weights are rounded once folded.

The interpreter differs from a GPU in three ways. It multiplies bf16 matrices wrongly: bf16 products are tested on GPUs
only. It cuts float32 off to bf16 where GPUs round: a whole unit of bf16 is allowed. It adds the rows of a block one
after another (NumPy's sum over the first axis) where GPUs add pairs of pairs: the 1e-6 is of the largest value there,
if that is above 1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
DTYPES = [torch.float32, torch.float16, *([torch.bfloat16] if ON_GPU else [])]
EXACT = [torch.float32, torch.float16, torch.bfloat16]  # kernels without a matrix product


def random_tensor(*shape: int, seed: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> Tensor:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale
    return values.to(device=DEVICE, dtype=dtype)


def outputs_and_gradients(
    function: Callable[..., Tensor], inputs: list[Tensor], grad: Tensor | None = None
) -> list[Tensor]:
    """The output of a function, and the gradients of all its inputs."""
    leaves = [value.detach().clone().requires_grad_() for value in inputs]
    output = function(*leaves)
    grad = torch.ones_like(output) if grad is None else grad.to(output.dtype)
    return [output.detach(), *torch.autograd.grad(output, leaves, grad)]


def compare(got: list[Tensor], own: list[Tensor], exact: list[Tensor], dtype: torch.dtype, factor: float = 2.0) -> None:
    """Hold `got` to the rule above; a gradient, which comes after the output, may add 2^-9 in half precision."""
    for number, (a, b, c) in enumerate(zip(got, own, exact, strict=True)):
        largest = c.abs().max().item()
        allowed = factor * (b - c).abs().max().item() + 1e-6 * (1.0 if ON_GPU else max(1.0, largest))
        if dtype != torch.float32 and number:
            allowed += 2**-9 * largest
        if dtype == torch.bfloat16 and not ON_GPU:
            allowed += 2**-8 * largest
        error = (a - c).abs().max().item()
        assert error <= allowed, f"result {number}: error {error:.3g}, allowed {allowed:.3g}"


def check(
    fused: Callable[..., Tensor], plain: Callable[..., Tensor], inputs: list[Tensor], factor: float = 2.0
) -> None:
    """Both in the inputs' dtype against `plain` in float64, output and gradients of all inputs."""
    dtype = inputs[0].dtype
    grad = random_tensor(*plain(*inputs).shape, seed=99, dtype=dtype).to(inputs[0].device)
    exact = outputs_and_gradients(plain, [value.double() for value in inputs], grad)
    own = outputs_and_gradients(plain, inputs, grad)
    compare(outputs_and_gradients(fused, inputs, grad), own, exact, dtype, factor)


def layer_inputs(
    n: int, c: int, h: int, w: int, k: int, dtype: torch.dtype = torch.float32, seed: int = 0
) -> list[Tensor]:
    """x, 3x3 weights and bias."""
    return [
        random_tensor(n, c, h, w, seed=10 * seed + 1, dtype=dtype),
        random_tensor(k, c, 3, 3, seed=10 * seed + 2, dtype=dtype, scale=(9 * c) ** -0.5),
        random_tensor(k, seed=10 * seed + 3, dtype=dtype),
    ]
