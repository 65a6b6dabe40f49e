"""cuDNN's own fusion of convolution, bias and ELU through its frontend; raced where nvidia-cudnn-frontend is there."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

INSTALLED = find_spec("cudnn") is not None


def conv_bias_elu(stride: int) -> Callable[..., list[Tensor]]:
    """The forward pass of a 3x3 layer as one cuDNN graph, for inputs of one shape.

    It takes x (N, C, H, W), weight (K, C, 3, 3) and bias (K,), channels_last on one CUDA device, and raises what cuDNN
    raises where no engine of it takes them.
    """
    built: list[Callable[[dict[str, Tensor]], None]] = []

    def run(x: Tensor, weight: Tensor, bias: Tensor) -> list[Tensor]:
        sides = ((side - 1) // stride + 1 for side in x.shape[2:])
        y = x.new_empty(len(x), len(weight), *sides).contiguous(memory_format=torch.channels_last)
        tensors = {"x": x, "weight": weight, "bias": bias.view(1, -1, 1, 1), "y": y}
        if not built:
            built.append(_build(tensors, stride))
        built[0](tensors)
        return [y]

    return run


def _build(tensors: dict[str, Tensor], stride: int) -> Callable[[dict[str, Tensor]], None]:
    import cudnn  # pyright: ignore[reportMissingImports]  # optional

    handle, float32 = cudnn.create_handle(), cudnn.data_type.FLOAT
    graph = cudnn.pygraph(handle=handle, intermediate_data_type=float32, compute_data_type=float32)
    ends: dict[str, Any] = {name: graph.tensor_like(tensors[name]) for name in ("x", "weight", "bias")}
    options = {"padding": [1, 1], "stride": [stride, stride], "dilation": [1, 1]}
    found = graph.conv_fprop(image=ends["x"], weight=ends["weight"], **options)
    found = graph.elu(input=graph.bias(input=found, bias=ends["bias"]))
    found.set_output(True).set_dim(list(tensors["y"].shape)).set_stride(list(tensors["y"].stride()))
    ends["y"] = found.set_data_type(ends["x"].get_data_type())
    graph.build([cudnn.heur_mode.A])
    workspace = torch.empty(max(1, graph.get_workspace_size()), dtype=torch.uint8, device=tensors["x"].device)

    def execute(given: dict[str, Tensor]) -> None:
        cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream().cuda_stream)  # a capture has its own
        graph.execute({end: given[name] for name, end in ends.items()}, workspace, handle=handle)

    return execute
