"""The nets of tests/families run as their originals do, and have the pairs that their structure says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import PARAMETERS, Net, run
from tests.families.pairs import pairs, tensors

FORMATS = pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"])
nets = pytest.mark.parametrize("net", PARAMETERS)


def _laid_out(example: Any, memory_format: torch.memory_format) -> Any:
    if isinstance(example, tuple):
        return tuple(_laid_out(part, memory_format) for part in example)
    is_map = isinstance(example, Tensor) and example.dim() == 4
    return example.contiguous(memory_format=memory_format) if is_map else example


@nets
@FORMATS
@pytest.mark.parametrize("training", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["train", "eval"])
def test_runs_forward_and_backward(net: Net, memory_format: torch.memory_format, training: bool) -> None:
    torch.manual_seed(0)
    model = net.make().to(memory_format=memory_format).train(training)  # pyright: ignore[reportCallIssue]
    for batch in (1, 4):
        example = _laid_out(net.example(batch), memory_format)
        if memory_format is torch.channels_last and not net.channels_last:
            with pytest.raises(RuntimeError, match="view size is not compatible"):
                run(model, example)
            continue
        outputs = [output for output in tensors(run(model, example)) if output.is_floating_point()]
        assert outputs and all(output.isfinite().all() for output in outputs)
        torch.stack([output.square().mean() for output in outputs]).sum().backward()
        gradients = [weight.grad for weight in model.parameters() if weight.grad is not None]
        assert gradients and all(gradient.isfinite().all() for gradient in gradients)


@nets
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_pairs_are_those_of_the_structure(net: Net, training: bool) -> None:
    torch.manual_seed(0)
    assert pairs(net.make().train(training), net.example(2)) == net.pairs | {"shared": net.shared}
