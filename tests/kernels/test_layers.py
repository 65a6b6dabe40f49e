"""The layers and losses as modules: nn.Conv2d's state dict, and the usual handling of modules in torch."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from fastbegan_kernels.layers import Conv2dELU, ConvStage, DownsampleConv2dELU, UpsampleConv2dELU
from fastbegan_kernels.losses import (
    HingeLoss,
    L1ReconstructionLoss,
    L2ReconstructionLoss,
    LatentL1Loss,
    PullAwayTerm,
    SqrtSumReconstructionLoss,
)
from tests.helpers.oracle import DEVICE, check, random_tensor


class _Plain(nn.Module):
    """A layer of torch's modules, with the same state dict."""

    def __init__(self, conv: nn.Conv2d, before: Callable[[Tensor], Tensor], after: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.weight, self.bias, self.conv = conv.weight, conv.bias, [conv]
        self.before, self.after = before, after

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv[0]
        return self.after(F.conv2d(self.before(x), self.weight, self.bias, conv.stride, conv.padding))


def _same(x: Tensor) -> Tensor:
    return x


def _double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0)


def _end(x: Tensor) -> Tensor:
    return F.pad(x, (0, 1, 0, 1))


LAYERS: dict[str, tuple[Callable[[], nn.Module], Callable[[], nn.Module]]] = {
    "same": (lambda: Conv2dELU(4, 6), lambda: _Plain(nn.Conv2d(4, 6, 3, padding=1), _same, F.elu)),
    "1x1": (
        lambda: Conv2dELU(4, 6, 1, activation="relu", bias=False),
        lambda: _Plain(nn.Conv2d(4, 6, 1, bias=False), _same, F.relu),
    ),
    "up": (
        lambda: UpsampleConv2dELU(4, 6, activation="leaky_relu", alpha=0.2),
        lambda: _Plain(nn.Conv2d(4, 6, 3, padding=1), _double, lambda y: F.leaky_relu(y, 0.2)),
    ),
    "down": (
        lambda: DownsampleConv2dELU(4, 6, activation="silu"),
        lambda: _Plain(nn.Conv2d(4, 6, 3, 2, 1), _same, F.silu),
    ),
    "end": (
        lambda: DownsampleConv2dELU(4, 6, padding="end", activation="none"),
        lambda: _Plain(nn.Conv2d(4, 6, 3, 2), _end, _same),
    ),
    "stage": (
        lambda: ConvStage(
            Conv2dELU(4, 5, activation="relu"), UpsampleConv2dELU(5, 6), DownsampleConv2dELU(6, 4, padding="end")
        ),
        lambda: nn.Sequential(
            _Plain(nn.Conv2d(4, 5, 3, padding=1), _same, F.relu),
            _Plain(nn.Conv2d(5, 6, 3, padding=1), _double, F.elu),
            _Plain(nn.Conv2d(6, 4, 3, 2), _end, F.elu),
        ),
    ),
}
IMAGES, STORED = torch.zeros(2, 3, 4, 4, device=DEVICE), torch.zeros(2, 3, 4, 4, device=DEVICE, dtype=torch.uint8)
EVERY = pytest.mark.parametrize("kind", LAYERS)
pytestmark = pytest.mark.core


def _pair(kind: str) -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    fast, plain = (make().to(DEVICE) for make in LAYERS[kind])
    fast.load_state_dict(plain.state_dict())
    return fast, plain


def _as_function(module: nn.Module) -> Callable[..., Tensor]:
    names = [name for name, _ in module.named_parameters()]
    return lambda x, *values: torch.func.functional_call(module, dict(zip(names, values, strict=True)), (x,))


@EVERY
def test_a_layer_is_what_its_parts_are(kind: str) -> None:
    """Also through torch.func.functional_call, which passes the weights here."""
    fast, plain = _pair(kind)
    assert list(fast.state_dict()) == list(plain.state_dict())
    inputs = [random_tensor(3, 4, 6, 8, seed=1), *(value.detach() for value in plain.parameters())]
    check(_as_function(fast), _as_function(plain), inputs, factor=4.0)


@EVERY
def test_compiled_copied_and_pickled(kind: str) -> None:
    layer, _ = _pair(kind)
    x = random_tensor(2, 4, 6, 6, seed=2)
    expected = layer(x)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for one in (compiled, copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        torch.testing.assert_close(one(x), expected)
    assert "activation=" in repr(layer)


@EVERY
def test_autocast(kind: str) -> None:
    layer, plain = _pair(kind)
    x = random_tensor(2, 4, 6, 6, seed=3)
    with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
        found, expected = layer(x), plain(x)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.float(), expected.float(), atol=0.03, rtol=0.03)


def test_export_sees_through_them() -> None:
    layer, _ = _pair("stage")
    x = random_tensor(2, 4, 6, 6, seed=3)
    exported = torch.export.export(layer, (x,))
    torch.testing.assert_close(exported.module()(x), layer(x))


def _initialise(module: nn.Module) -> None:
    """Initialisers of DCGAN, CycleGAN and PyTorch-GAN choose modules by class name."""
    if module.__class__.__name__.find("Conv") != -1:
        nn.init.normal_(module.weight.data, 0.0, 0.02)  # pyright: ignore[reportArgumentType]
        if module.bias is not None:
            nn.init.constant_(module.bias.data, 0.5)  # pyright: ignore[reportArgumentType]


@EVERY
def test_initialised_by_class_name(kind: str) -> None:
    """The same seed gives the same weights as in plain layers."""
    layer = LAYERS[kind][0]()
    torch.manual_seed(0)
    layer.apply(_initialise)
    torch.manual_seed(0)
    for name, value in layer.state_dict().items():
        expected = torch.full_like(value, 0.5) if name.endswith("bias") else torch.randn(value.shape) * 0.02
        torch.testing.assert_close(value, expected)


def test_a_stage_has_no_weight_of_its_own() -> None:
    """Spectral norms and regularisers look for a `weight` in every module."""
    stage = LAYERS["stage"][0]()
    assert not hasattr(stage, "weight") and type(stage) is ConvStage and "Conv" not in type(stage).__name__


@EVERY
@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore::FutureWarning")
def test_traced_saved_and_loaded(kind: str, gradients: bool, tmp_path: Path) -> None:
    """The trace holds torch's operations only, takes other sizes, and has derivatives of every order."""
    layer, plain = _pair(kind)
    with torch.set_grad_enabled(gradients):
        traced: Any = torch.jit.trace(layer, random_tensor(2, 4, 6, 8, seed=1))  # a TracerWarning would be an error
    torch.jit.save(traced, tmp_path / "layer.pt")
    loaded = torch.jit.load(tmp_path / "layer.pt")
    x = random_tensor(3, 4, 8, 10, seed=2)
    torch.testing.assert_close(loaded(x), plain(x), atol=1e-5, rtol=1e-5)
    assert "fastbegan::" not in str(traced.inlined_graph) and "PythonOp" not in str(traced.inlined_graph)


def test_wrong_arguments_are_named() -> None:
    for make, message in (
        (lambda: Conv2dELU(4, 4, 2), "kernel_size is 2; accepted: odd numbers"),
        (lambda: Conv2dELU(4, 4, stride=3), "stride is 3; accepted: 1, 2"),
        (
            lambda: Conv2dELU(4, 4, padding="end"),
            "padding is 'end' with stride 1; accepted: same, and with stride 2 end",
        ),
        (lambda: Conv2dELU(4, 4, activation="gelu"), "activation is 'gelu'; accepted: elu"),
        (lambda: DownsampleConv2dELU(4, 4, padding="end", kernel_size=5), "kernel_size is 5"),
        (lambda: ConvStage(nn.Conv2d(4, 4, 3)), "layer 0 is a Conv2d; accepted: Conv2dELU and its kinds"),  # pyright: ignore
        (lambda: ConvStage(Conv2dELU(4, 4), Conv2dELU(4, 4, bias=False)), "a stage of 2 layers with alpha"),
        (lambda: ConvStage(), "a stage of 0 layers"),
        (lambda: Conv2dELU(4, 4, alpha="1"), "alpha is '1'; accepted: numbers >= 0"),  # pyright: ignore
        (lambda: HingeLoss(0.0), "margin is 0.0; accepted: numbers above 0"),
        (lambda: HingeLoss("1"), "margin is '1'; accepted: numbers above 0"),  # pyright: ignore
        (lambda: L1ReconstructionLoss()(IMAGES, STORED), r"target is torch.uint8; accepted: floating-point types"),
        (lambda: L2ReconstructionLoss()(STORED, IMAGES), r"prediction is torch.uint8; accepted: floating-point types"),
        (lambda: SqrtSumReconstructionLoss()(IMAGES, STORED), r"target is torch.uint8; accepted: floating-point types"),
        (
            lambda: L1ReconstructionLoss()(IMAGES, IMAGES[:1]),
            r"prediction is \[2, 3, 4, 4\] but target is \[1, 3, 4, 4",
        ),
        (lambda: LatentL1Loss()(IMAGES, IMAGES[:1]), r"prediction is \[2, 3, 4, 4\] but target is \[1, 3, 4, 4"),
        (lambda: PullAwayTerm()(torch.zeros(1, 3)), r"codes is \[1, 3\]; accepted"),
    ):
        with pytest.raises(ValueError, match=message):
            make()


def test_losses_by_hand() -> None:
    prediction = torch.tensor([[0.0, 3.0], [1.0, 1.0]], requires_grad=True)
    target = torch.tensor([[0.0, -1.0], [1.0, 1.0]], requires_grad=True)
    assert L1ReconstructionLoss()(prediction, target).tolist() == [2.0, 0.0]
    assert L2ReconstructionLoss()(prediction, target).tolist() == [8.0, 0.0]
    distance = SqrtSumReconstructionLoss()(prediction, target)
    assert distance.tolist() == [4.0, 0.0]
    distance.sum().backward()
    assert prediction.grad is not None and prediction.grad.tolist() == [[0.0, 1.0], [0.0, 0.0]]  # not NaN at 0
    target.grad = None
    L1ReconstructionLoss(detach_target=True)(prediction, target).sum().backward()
    assert target.grad is None
    assert HingeLoss(1.0)(torch.tensor([0.25, 2.0])).tolist() == [0.75, 0.0]
    assert LatentL1Loss()(torch.tensor([[1.0, 2.0]]), torch.tensor([[0.0, 0.0]])).tolist() == [1.5]


def test_the_pull_away_term() -> None:
    term = PullAwayTerm()
    assert term(torch.eye(3)).item() == 0.0
    assert term(torch.tensor([[1.0, 0.0], [-2.0, 0.0]])).item() == pytest.approx(1.0)
    codes = random_tensor(5, 2, 3, seed=1)
    cosines = F.cosine_similarity(codes.flatten(1)[:, None], codes.flatten(1)[None], dim=2)
    expected = sum(cosines[i, j].item() ** 2 for i in range(5) for j in range(5) if i != j) / 20
    assert term(codes).item() == pytest.approx(expected, rel=1e-5)


def test_distributed_data_parallel_takes_them() -> None:
    layer, plain = _pair("stage")
    x = random_tensor(2, 4, 6, 6, seed=3)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(layer)
        parallel(x).sum().backward()
    finally:
        dist.destroy_process_group()
    plain(x).sum().backward()
    for one, other in zip(layer.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
