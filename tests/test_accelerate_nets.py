"""accelerate on the nets that people have: the same values, every pair of operations followed, all taken on a GPU."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastbegan.convert import Report, accelerate, compare
from tests.families import NETS, PARAMETERS, Net, run
from tests.families.pairs import tensors

VARIANTS = (
    "pix2pix", "pix2pix_reflect", "pix2pix_patchgan", "cyclegan", "lightweight_gan_shuffle", "vqvae2", "vq_model",
    "carpedm20_discriminator_pooled", "ganomaly", "vqgan_encoder", "carpedm20_discriminator", "vqvae2_nearest",
    "lightweight_gan_discriminator", "autoencoder_tiny",
)  # fmt: skip
FAST = [(4, True, False)]
CASES = [
    pytest.param(batch, training, last, marks=[] if (batch, training, last) in FAST else pytest.mark.slow)
    for batch in (1, 4)
    for training in (True, False)
    for last in (True, False)
]


def _made(net: Net, training: bool, last: bool) -> Any:
    torch.manual_seed(0)
    model = net.make().train(training)
    return model.to(memory_format=torch.channels_last) if last else model  # pyright: ignore


def _laid_out(example: Any, last: bool) -> Any:
    layout = torch.channels_last if last else torch.contiguous_format
    values = example if isinstance(example, tuple) else (example,)
    values = tuple(
        value.contiguous(memory_format=layout) if isinstance(value, Tensor) and value.dim() == 4 else value
        for value in values
    )
    return values if isinstance(example, tuple) else values[0]


def _report(model: nn.Module) -> Report:
    report = model.fastbegan_report
    assert isinstance(report, Report)
    return report


def _counts(net: Net) -> dict[str, int]:
    return {kind: net.pairs[kind] for kind in ("up", "activation", "norm")}


@pytest.mark.usefixtures("take_all")
@pytest.mark.parametrize(("batch", "training", "last"), CASES)
@pytest.mark.parametrize(
    "net",
    [
        pytest.param(*one.values, id=one.id, marks=(*one.marks, pytest.mark.slow)) if one.id in VARIANTS else one
        for one in PARAMETERS
    ],
)
def test_values_and_formats_are_the_same_where_all_is_taken(net: Net, batch: int, training: bool, last: bool) -> None:
    if last and not net.channels_last:
        pytest.skip("the net itself does not run in channels_last")
    model, example = _made(net, training, last), _laid_out(net.example(batch), last)
    own = copy.deepcopy(model)
    accelerate(model, check=example) if sum(_counts(net).values()) else accelerate(model)
    torch.manual_seed(3)
    expected = tensors(run(own, example))
    torch.manual_seed(3)
    got = tensors(run(model, example))
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype and one.stride() == other.stride()
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.detach().abs().max()))
    report = _report(model)
    assert {kind: len(met) for kind, met in report.pairs.items()} == _counts(net), report
    assert all(taken for met in report.pairs.values() for taken in met.values()), report


@pytest.mark.slow
@pytest.mark.parametrize("net", PARAMETERS)
def test_every_pair_is_followed_on_a_cpu(net: Net) -> None:
    """What is left has a reason of the layer's own."""
    model, example = _made(net, True, False), net.example(4)
    before, exact = compare.values(model, example), compare.truth(model, example)
    accelerate(model)
    compare.compare(before, compare.values(model, example), exact).require_near()
    report = _report(model)
    assert {kind: len(met) for kind, met in report.pairs.items()} == _counts(net), report
    assert not any("followed" in reason for reason in report.left.values()), report
    assert not any("Error" in reason or "Failed" in reason for reason in report.breaks), report


def test_the_list_is_whole() -> None:
    assert len(NETS) >= 20
