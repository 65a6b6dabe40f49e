"""`accelerate` on models that know nothing of fastbegan: a decoder, the nets that people have, its rule for a CPU."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from bench.cases import DEVICE, DTYPE, ON_CPU, PRECISION
from fastbegan.convert import accelerate, gains
from fastbegan.device import pick_compile
from fastbegan.measure.results import Row
from tests.families import PARAMETERS, Net, diffusers_nets, run
from tests.families.pairs import tensors

BATCH = 16
Turn = Callable[[], None]


def decoder(width: int, blocks: int = 4) -> nn.Sequential:
    """[N, width, 4, 4] -> [N, 3, 64, 64] with four blocks."""
    layers: list[nn.Module] = []
    for _ in range(blocks):
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1), nn.ELU(inplace=True)]
    return nn.Sequential(*layers, nn.Conv2d(width, 3, 3, padding=1), nn.Tanh())


def contenders(plain: nn.Module, example: Any, quick: bool) -> dict[str, Any]:
    """The accelerated net, and what it is raced against."""
    last: Any = copy.deepcopy(plain)
    last.to(memory_format=torch.channels_last)
    fast = accelerate(copy.deepcopy(last), check=example if ON_CPU else None)
    nets: dict[str, Any] = {"accelerate": fast, "eager, channels_last": last, "eager": plain}
    compiler = None if quick else pick_compile("auto", DEVICE, float("inf"))[0]
    if compiler is not None:
        torch.compiler.reset()
        nets["compile"] = torch.compile(copy.deepcopy(plain), mode=compiler)
    return nets


def turn(net: Any, example: Any, *, backward: bool = True) -> Turn:
    """A call of a net, in the precision of the device."""
    given = example.clone().requires_grad_() if isinstance(example, Tensor) else example

    def call() -> None:
        with torch.set_grad_enabled(backward), torch.autocast(DEVICE.type, dtype=DTYPE, enabled=not ON_CPU):
            outputs = [value for value in tensors(run(net, given)) if value.is_floating_point()]
        if backward:
            terms = [value.float().square().mean() for value in outputs if value.requires_grad]
            torch.stack(terms).sum().backward()

    return call


@pytest.mark.parametrize("width", [64, 128])
def bench_accelerate(width: int, quick: bool, race: Callable[..., Row], needs: Callable[[float], None]) -> None:
    if quick and width != 64:
        pytest.skip("not in --quick")
    needs(1 << 30)
    torch.manual_seed(0)
    plain, x = decoder(width).to(DEVICE), torch.randn(BATCH, width, 4, 4, device=DEVICE)
    nets = contenders(plain, x, quick)
    row = Row("accelerate", f"decoder n {width} 64 px both", precision=PRECISION, images=BATCH)
    race(row, {name: turn(net, x) for name, net in nets.items()})


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "both"])
@pytest.mark.parametrize("pixels", [128] if ON_CPU else [256, 512])
def bench_accelerate_decode(
    backward: bool, pixels: int, quick: bool, race: Callable[..., Row], needs: Callable[[float], None]
) -> None:
    """diffusers' AutoencoderKL, its decoder alone. The FLOPs of both sides give the bound of the ratio."""
    pytest.importorskip("diffusers")
    needs(float(1 << (30 if ON_CPU else 34)))
    torch.manual_seed(0)
    full: Any = diffusers_nets.autoencoder_kl((64, 128, 128)) if ON_CPU else diffusers_nets.stable_diffusion_depth()
    plain = full.decoder.to(DEVICE)
    z = torch.randn(1, 4, pixels // (4 if ON_CPU else 8), pixels // (4 if ON_CPU else 8), device=DEVICE)
    nets = contenders(plain, z, quick)
    with FlopCounterMode(display=False) as counter:
        plain(z)
    times = 3 if backward else 1
    theirs = counter.get_total_flops() * times
    row = Row(
        "accelerate",
        f"AutoencoderKL's decoder {pixels} px {'both' if backward else 'forward'}",
        precision=PRECISION,
        images=1,
        flops=theirs - up_flops(plain, z) * times * 5 // 9,
        textbook_flops=theirs,
    )
    race(row, {name: turn(net, z, backward=backward) for name, net in nets.items()})


def up_flops(decoder: nn.Module, z: Tensor) -> int:
    """FLOPs of the convolutions behind an upsampling, in a forward of diffusers' decoder."""
    counted: list[int] = []

    def count(conv: nn.Module, _: object, y: Tensor) -> None:
        assert isinstance(conv, nn.Conv2d)
        counted.append(2 * y.shape[0] * y.shape[2] * y.shape[3] * conv.weight.numel())

    ups = [m for path, m in decoder.named_modules() if "upsamplers" in path and isinstance(m, nn.Conv2d)]
    handles = [conv.register_forward_hook(count) for conv in ups]
    decoder(z)
    for handle in handles:
        handle.remove()
    return sum(counted)


@pytest.mark.parametrize("net", PARAMETERS)
def bench_accelerate_nets(net: Net, quick: bool, race: Callable[..., Row], needs: Callable[[float], None]) -> None:
    if quick:
        pytest.skip("not in --quick")
    if not (net.pairs["up"] if ON_CPU else sum(net.pairs.values())) or not net.channels_last:
        pytest.skip("nothing in it is faster here, or it does not run in channels_last")
    needs(2 << 30)
    torch.manual_seed(0)
    plain, example = net.larger().to(DEVICE), net.larger_example(4)
    example = tuple(map(_moved, example)) if isinstance(example, tuple) else _moved(example)
    nets = contenders(plain, example, quick=True)
    name = f"{type(plain).__module__.rpartition('.')[2]}.{type(plain).__name__} {hash_of(net)} both"
    race(Row("accelerate", name, precision=PRECISION, images=4), {key: turn(one, example) for key, one in nets.items()})


def hash_of(net: Net) -> str:
    """What tells variants of one class apart: the pairs in it."""
    return "/".join(str(net.pairs[kind]) for kind in ("up", "activation", "norm"))


def _moved(value: Any) -> Any:
    return value.to(DEVICE) if isinstance(value, Tensor) else value


@pytest.mark.parametrize("channels", [16, 32, 64, 128, 256])
def bench_accelerate_rule(channels: int, quick: bool, race: Callable[..., Row]) -> None:
    """An up-convolution with the fewest pixels with which it is taken on a CPU."""
    if not ON_CPU or (quick and channels != 64):
        pytest.skip("a rule for CPUs; in --quick for 64 channels")
    torch.manual_seed(0)
    side = next(n for n in range(1, 999) if n * n >= gains.least_pixels(channels, channels, torch.float32))
    plain = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(channels, channels, 3, padding=1))
    x = torch.randn(1, channels, side, side)
    fast = accelerate(copy.deepcopy(plain), check=x)
    row = Row("accelerate", f"rule up {channels} at {side * side} px both", images=1)
    race(row, {"accelerate": turn(fast, x), "eager": turn(plain, x)})
