"""What the backward ops of the convolutions return: gradients of input, weight and bias, empty where not needed."""

from __future__ import annotations

import torch
from torch import Tensor


def results(
    dx: Tensor | None, dw: Tensor | None, db: Tensor, x: Tensor, weight: Tensor, needs: list[bool]
) -> tuple[Tensor, Tensor, Tensor]:
    """dx channels_last like x, dw contiguous like weight, db float32; zeros where an empty batch left None."""
    if needs[0]:
        dx = (torch.zeros_like(x) if dx is None else dx).contiguous(memory_format=torch.channels_last)
    if needs[1]:
        dw = (torch.zeros_like(weight) if dw is None else dw.to(weight.dtype)).contiguous()
    return (
        dx if dx is not None and needs[0] else x.new_empty(0),
        dw if dw is not None and needs[1] else weight.new_empty(0),
        db if needs[2] else weight.new_empty(0, dtype=torch.float32),
    )


def fake_results(x: Tensor, weight: Tensor, needs: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
    """The same without values."""
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    return (
        dx if needs[0] else x.new_empty(0),
        weight.new_empty(weight.shape) if needs[1] else weight.new_empty(0),
        weight.new_empty(weight.shape[0] if needs[2] else 0, dtype=torch.float32),
    )
