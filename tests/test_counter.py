"""Counter-based random numbers: right, stable, and free of state."""

from __future__ import annotations

import torch

from fastbegan import counter

_MASK = (1 << 64) - 1


def _splitmix(value: int) -> int:
    """SplitMix64's finaliser, written with unbounded Python integers."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def test_tensor_arithmetic_equals_integer_arithmetic() -> None:
    golden = 0x9E3779B97F4A7C15
    for seed, stream in ((0, 0), (7, 3), (2**63 + 5, 1)):
        key = _splitmix((_splitmix((seed + golden) & _MASK) + (stream + 1) * golden) & _MASK)
        index = torch.tensor([0, 1, 2, 12345, 2**62])
        expected = [_splitmix((i * golden + key) & _MASK) for i in index.tolist()]
        assert [v & _MASK for v in counter.bits(seed, stream, index).tolist()] == expected


def test_these_values_never_change() -> None:
    # runs continue from a position alone: another value here would break every checkpoint
    assert counter.bits(1, counter.Z_D, torch.tensor([0, 1])).tolist() == FROZEN


FROZEN = [7503177360528583422, 4472672866095287216]


def test_uniform_is_uniform() -> None:
    values = counter.uniform(3, counter.Z_D, torch.arange(200_000)).double()
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean().item() - 0.5) < 0.003
    assert abs(values.var().item() - 1 / 12) < 0.001
    histogram = torch.histc(values, 20, 0, 1)
    assert ((histogram - 10_000).abs() < 500).all()
    assert abs(torch.corrcoef(torch.stack((values[:-1], values[1:])))[0, 1].item()) < 0.01


def test_streams_and_seeds_are_unrelated() -> None:
    index = torch.arange(50_000)
    rows = [counter.uniform(s, t, index) for s, t in ((0, 0), (0, 1), (1, 0), (1, 1))]
    off_diagonal = torch.corrcoef(torch.stack(rows)) - torch.eye(4)
    assert off_diagonal.abs().max() < 0.02


def test_latents_do_not_depend_on_the_batch_size() -> None:
    whole = counter.latents(0, counter.Z_D, 40, 6, 8)
    parts = [counter.latents(0, counter.Z_D, 40, 2, 8), counter.latents(0, counter.Z_D, 42, 4, 8)]
    assert torch.equal(whole, torch.cat(parts))
    assert whole.min() >= -1 and whole.max() < 1 and whole.std() > 0.4


def test_permutations() -> None:
    first, second = (counter.permutation(0, counter.ORDER, epoch, 1000) for epoch in (0, 1))
    assert sorted(first.tolist()) == list(range(1000))
    assert not torch.equal(first, second)
    assert (first == torch.arange(1000)).sum() < 10
