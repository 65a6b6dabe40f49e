"""`accelerate` on a model that knows nothing of fastbegan: a decoder of four up-blocks, forward and backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from bench.cases import DEVICE, DTYPE, ON_CPU, PRECISION
from fastbegan.convert import accelerate
from fastbegan.device import pick_compile
from fastbegan.measure.results import Row

BATCH = 16


def decoder(width: int, blocks: int = 4) -> nn.Sequential:
    """[N, width, 4, 4] -> [N, 3, 64, 64] with four blocks."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.ELU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())


@pytest.mark.parametrize("width", [64, 128])
def bench_accelerate(width: int, quick: bool, race: Callable[..., Row], needs: Callable[[float], None]) -> None:
    if quick and width != 64:
        pytest.skip("not in --quick")
    needs(1 << 30)
    torch.manual_seed(0)
    plain, x = decoder(width).to(DEVICE), torch.randn(BATCH, width, 4, 4, device=DEVICE)
    last: Any = copy.deepcopy(plain)
    last.to(memory_format=torch.channels_last)
    fast = accelerate(copy.deepcopy(last), check=x)
    nets: dict[str, Any] = {"accelerate": fast, "eager, channels_last": last, "eager": plain}
    compiler = None if quick else pick_compile("auto", DEVICE, float("inf"))[0]
    if compiler is not None:
        torch.compiler.reset()
        nets["compile"] = torch.compile(copy.deepcopy(plain), mode=compiler)

    def turn(net: Callable[[Tensor], Tensor]) -> Callable[[], None]:
        given = x.clone().requires_grad_()

        def run() -> None:
            with torch.autocast(DEVICE.type, dtype=DTYPE, enabled=not ON_CPU):
                output = net(given)
            output.float().square().mean().backward()

        return run

    row = Row("accelerate", f"decoder n {width} 64 px both", precision=PRECISION, images=BATCH)
    race(row, {name: turn(net) for name, net in nets.items()})
