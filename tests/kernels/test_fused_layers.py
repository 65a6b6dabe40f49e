"""The matrix-product kernels against their twins in float64: on a GPU compiled, elsewhere under the interpreter."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from fastbegan_kernels import conv2d_elu, conv_stage, library, reference, upsample_conv2d_elu
from fastbegan_kernels.conv_layer import KINDS
from fastbegan_kernels.fold import fold_upsample
from tests.helpers.oracle import DEVICE, DTYPES, ON_GPU, check, compare, layer_inputs, random_tensor

conv = pytest.importorskip("fastbegan_kernels.fused.conv")  # where there is no Triton there is nothing to test
from fastbegan_kernels.fused import conv_tiles as tiles  # noqa: E402

SHAPES = [  # N, C, H, W, K
    (2, 16, 8, 8, 16),  # one tile
    (2, 20, 7, 9, 12),  # nothing divides by a tile
    (1, 3, 16, 16, 24),  # images: fewer channels than a block
    (2, 32, 5, 5, 3),  # to images
    (1, 5, 1, 1, 7),  # one pixel: eight of nine taps are padding
    (1, 18, 3, 3, 17),  # two blocks of channels each way, the second nearly empty, one by one
    (2, 40, 5, 4, 24),  # the same in whole copies
]
SLOW = pytest.mark.slow
FAST = [(SHAPES[1], torch.float32), (SHAPES[4], torch.float32), (SHAPES[5], torch.float16)]
CASES = [
    pytest.param(shape, dtype, seed, marks=() if seed == 0 and (shape, dtype) in FAST else SLOW)
    for seed in (0, 1)
    for dtype in DTYPES
    for shape in SHAPES
]


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize(("shape", "dtype", "seed"), CASES)
def test_conv2d_elu(shape: tuple[int, ...], stride: int, dtype: torch.dtype, seed: int) -> None:
    check(
        lambda x, w, b: conv2d_elu(x, w, b, stride=stride, impl="fused"),
        lambda x, w, b: reference.conv2d_elu(x, w, b, stride=stride),
        layer_inputs(*shape, dtype=dtype, seed=seed),
    )


@pytest.mark.parametrize("stride", [1, 2])
def test_conv2d_elu_1x1_without_bias(stride: int) -> None:
    inputs = [random_tensor(2, 10, 5, 6, seed=1), random_tensor(7, 10, 1, 1, seed=2, scale=0.3)]
    check(
        lambda x, w: conv2d_elu(x, w, stride=stride, impl="fused"),
        lambda x, w: reference.conv2d_elu(x, w, stride=stride),
        inputs,
    )


@pytest.mark.parametrize(("shape", "dtype", "seed"), CASES)
def test_upsample_conv2d_elu(shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> None:
    check(
        lambda x, w, b: upsample_conv2d_elu(x, w, b, impl="fused"),
        reference.upsample_conv2d_elu,
        layer_inputs(*shape, dtype=dtype, seed=seed),
        factor=2.0 if dtype == torch.float32 else 4.0,
    )


@pytest.mark.parametrize("cell", [pytest.param(2, marks=SLOW), 4, pytest.param(8, marks=SLOW)])
def test_upsample_conv2d_elu_with_a_skip_table(cell: int) -> None:
    size, out = 4, 5
    inputs = [*layer_inputs(2, 6, size * cell // 2, size * cell // 2, out)]
    inputs.append(random_tensor(2, 3, 3, size, size, out, seed=4))
    check(
        lambda x, w, b, s: upsample_conv2d_elu(x, w, b, skip=s, impl="fused"),
        lambda x, w, b, s: reference.upsample_conv2d_elu(x, w, b, skip=s),
        inputs,
    )


@pytest.mark.parametrize(
    ("activation", "alpha"), [("elu", 0.5), ("relu", 1), ("leaky_relu", 0.2), ("silu", 1), ("none", 1)]
)
@pytest.mark.parametrize("op", [conv2d_elu, upsample_conv2d_elu])
def test_activations_with_a_carry(op: Callable[..., Tensor], activation: str, alpha: float) -> None:
    settings = {"activation": activation, "alpha": alpha}
    carry = torch.tensor(0.3, device=DEVICE)
    check(
        lambda *a: op(*a, **settings, carry=carry, impl="fused"),
        lambda *a: op(*a, **settings, carry=carry.to(a[0].dtype), impl="reference"),
        layer_inputs(2, 6, 4, 4, 6),
    )


def _parts(kind: str, shape: Sequence[int], dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """x, a packed weight, and a gradient at the output of a layer of shape N, C, H, W, K."""
    n, c, h, w, k = shape
    x, weight, _ = layer_inputs(n, c, h, w, k)
    packed = (fold_upsample(weight) if kind == "up" else weight).to(dtype)
    out_h, out_w = {"same": (h, w), "down": (-(-h // 2), -(-w // 2)), "up": (2 * h, 2 * w)}[kind]
    return x.to(dtype), packed, random_tensor(n, k, out_h, out_w, seed=5, dtype=dtype)


def _check_tile(kind: str, shape: Sequence[int], tile: tiles.AnyTile, dtype: torch.dtype, skip: int = 0) -> None:
    """Forward, and the input gradient with the derivative of the activation before it and its bias gradient."""
    x, weight, dz = _parts(kind, shape, dtype)
    bias = random_tensor(shape[4], seed=6)
    table = random_tensor(len(x), 3, 3, skip, skip, shape[4], seed=7, dtype=dtype) if skip else None
    settings = {"kind": kind, "activation": "elu", "alpha": 0.7}

    def forward(values: Sequence[Tensor | None]) -> list[Tensor]:
        a, b, c, d = values
        assert a is not None and b is not None
        return [library.forward(a, b, c, d, kind, "elu", 0.7)]

    def backward(d: Tensor, y: Tensor, w: Tensor) -> list[Tensor]:
        dx, db = library.input_gradient(d, y, w, kind, "elu", 0.7)
        assert db is not None
        return [dx, db]

    given = [x, weight, bias, table]
    got = conv.forward(*given, **settings, tile=tile)
    compare([got], forward(given), forward([None if v is None else v.double() for v in given]), dtype)
    y = reference.activate(x, "elu", 0.7)
    dx, db = conv.input_gradient(dz, weight, y, **settings, size=x.shape[2:], tile=tile)
    assert db is not None
    compare([dx, db], backward(dz, y, weight), backward(dz.double(), y.double(), weight.double()), dtype)
    plain, none = conv.input_gradient(dz, weight, kind=kind, size=x.shape[2:], tile=tile)
    exact = library.input_gradient(dz.double(), x.double(), weight.double(), kind, None, 1.0)
    assert none is None and (plain - exact[0]).abs().max() <= 1e-2 * exact[0].abs().max()


@pytest.mark.parametrize("dtype", [DTYPES[0], *(pytest.param(dtype, marks=SLOW) for dtype in DTYPES[1:])])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", [(1, 24, 5, 6, 24), pytest.param((2, 40, 3, 4, 16), marks=SLOW)])
def test_pointer_tiles(shape: tuple[int, ...], kind: str, dtype: torch.dtype) -> None:
    """Several blocks in every direction, the last of each partly empty."""
    _check_tile(kind, shape, tiles.Tile(16, 16, 16, 4, 2), dtype, skip=1 if kind == "up" else 0)


HALF = [dtype for dtype in DTYPES if dtype != torch.float32]


TILINGS = {
    "whole tiles": ((1, 32, 8, 8, 16), (1, 4, 4)),
    "nothing divides": ((3, 16, 6, 10, 32), (2, 4, 8)),  # samples, rows, columns
    "larger than the map": ((1, 48, 4, 4, 16), (1, 8, 8)),
}


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize(
    ("tiling", "kind"),
    [
        pytest.param(
            tiling, kind, marks=() if tiling == ("whole tiles" if kind == "up" else "nothing divides") else SLOW
        )
        for tiling in TILINGS
        for kind in KINDS
    ],
)
def test_tma_tiles(tiling: str, kind: str, dtype: torch.dtype) -> None:
    shape, block = TILINGS[tiling]
    tile = tiles.TmaTile(*block, 16, 16, 4, 2)
    for backward in (False, True):
        weight = (shape[1], shape[4], 4, 4) if kind == "up" else (shape[4], shape[1], 3, 3)
        assert tiles.fits(conv.product_of(shape[:4], weight, kind, backward), tile)
    _check_tile(kind, shape, tile, dtype, skip=2 if kind == "up" else 0)


@pytest.mark.parametrize("dtype", HALF)
def test_tma_tiles_take_channels_left_over(dtype: torch.dtype) -> None:
    _check_tile("same", (2, 24, 5, 7, 40), tiles.TmaTile(1, 4, 8, 16, 16, 4, 2), dtype)


@pytest.mark.parametrize("kind", KINDS)
def test_a_shipped_tile_of_each_family(kind: str) -> None:
    for tile in (tiles.HALF[2], tiles.TMA[-1]):
        _check_tile(kind, (2, 64, 8, 8, 64), tile, torch.float16)


def test_descriptors_get_aligned_memory() -> None:
    x, weight, _ = _parts("same", (1, 16, 4, 4, 16), torch.float16)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype, device=DEVICE)[1:].view(1, 4, 4, 16).permute(0, 3, 1, 2)
    shifted.copy_(x)
    assert shifted.data_ptr() % 16
    settings = {"kind": "same", "activation": "none", "alpha": 1.0, "tile": tiles.TmaTile(1, 4, 4, 16, 16, 4, 2)}
    assert torch.equal(
        conv.forward(shifted, weight, None, None, **settings), conv.forward(x, weight, None, None, **settings)
    )


def test_what_descriptor_kernels_do_not_take() -> None:
    tile = tiles.TmaTile(1, 8, 8, 64, 64, 4, 4)

    def fits(x: tuple[int, ...], weight: tuple[int, ...], kind: str, backward: bool = False) -> bool:
        return tiles.fits(conv.product_of(x, weight, kind, backward), tile)

    assert fits((2, 64, 8, 8), (64, 64, 3, 3), "same") and fits((2, 64, 8, 8), (64, 64, 3, 3), "down")
    assert not fits((2, 3, 8, 8), (64, 3, 3, 3), "same")  # rows of six bytes
    assert not fits((2, 64, 8, 8), (3, 64, 3, 3), "same")
    for size in ((9, 8), (8, 9)):
        x = (2, 64, *size)
        assert fits(x, (64, 64, 3, 3), "same") and not fits(x, (64, 64, 3, 3), "down")
        assert not fits(x, (64, 64, 3, 3), "down", backward=True)
    assert not fits((2, 96, 8, 8), (64, 96, 3, 3), "down")  # the second block would reach into the next pixel
    assert not fits((2, 64, 8, 8), (64, 96, 4, 4), "up") and fits((2, 96, 8, 8), (96, 64, 4, 4), "up")
    assert not tiles.tma_tiles(torch.float32, 90) and not tiles.tma_tiles(torch.bfloat16, 80)


def test_tiles_shrink_with_the_layer() -> None:
    def pick(dtype: torch.dtype, height: int, channels: int, outputs: int, capability: int) -> tiles.Tile:
        product = conv.product_of((16, channels, height, 256), (outputs, channels, 3, 3), "same", False)
        return tiles.pick_tile(product, dtype, capability)

    assert pick(torch.bfloat16, 256, 128, 128, 80) == tiles.AMPERE[0]
    assert pick(torch.bfloat16, 256, 128, 128, 90) == tiles.HALF[0]
    assert pick(torch.bfloat16, 256, 128, 128, 100) == tiles.HALF[1]
    assert pick(torch.bfloat16, 256, 64, 64, 90) == tiles.HALF[1]
    assert pick(torch.bfloat16, 1, 128, 128, 90).block_m == 64
    assert pick(torch.float32, 256, 128, 3, 80) == tiles.FULL[-1]
    assert pick(torch.bfloat16, 256, 3, 128, 90) == pick(torch.bfloat16, 256, 100, 128, 90) == tiles.HALF[-1]
    widths = [pick(torch.bfloat16, 256, 128, k, 80).block_k for k in (3, 16, 64, 128, 256)]
    assert all(a <= b for a, b in pairwise(widths))


@pytest.mark.parametrize("capability", [80, 90, 100])
@pytest.mark.parametrize("channels", [16, 32, 64, 96, 128, 256])
def test_candidates_are_few_and_suit(channels: int, capability: int) -> None:
    """Each candidate costs every new user a compilation and a trial: at most two more than the three of old."""
    for kind, backward, skip in itertools.product(("same", "down", "up"), (False, True), (False, True)):
        if skip and (kind != "up" or backward):
            continue
        weight = (channels, channels, 4, 4) if kind == "up" else (channels, channels, 3, 3)
        for dtype, side in itertools.product((torch.bfloat16, torch.float32), (8, 64)):
            product = conv.product_of((16, channels, side, side), weight, kind, backward, skip)
            candidates = tiles.tiles_for(product, dtype, capability, descriptors=True)
            pointer = [tile for tile in candidates if isinstance(tile, tiles.Tile)]
            fitting = [tile for tile in tiles.tma_tiles(dtype, capability) if tiles.fits(product, tile)]
            assert len(pointer) <= 5 and len(candidates) <= 3 + len(fitting) + 2
            assert all(tiles.suits(product, tile, capability) for tile in pointer)
            assert len(set(candidates)) == len(candidates)
            flat = [tile.flat for tile in candidates]
            assert flat == [False] * (len(flat) - product.transpose) + [True] * product.transpose


def test_tiles_are_found_by_their_names() -> None:
    every = (*tiles.AMPERE, *tiles.HALF, *tiles.FULL, *tiles.TMA)
    every += tuple(replace(tile, flat=True) for tile in every)
    assert [tiles.tile_named(tile.name) for tile in every] == list(every)
    with pytest.raises(ValueError, match="tile is 'pointer 1x1x1 w1 s1'"):
        tiles.tile_named("pointer 1x1x1 w1 s1")


STAGES = [
    (["same", "same"], 0),
    (["same", "down"], 0),
    (["same", "same", "up"], 2),
    (["up", "same"], 0),
    (["down", "up", "same", "up"], 4),
]
FAST_STAGES = [(["same", "down"], torch.float16), (["up", "same"], torch.float32)]


@pytest.mark.parametrize(
    ("kinds", "skip", "dtype"),
    [
        pytest.param(kinds, skip, dtype, marks=() if (kinds, dtype) in FAST_STAGES else SLOW)
        for dtype in DTYPES
        for kinds, skip in STAGES
    ],
)
def test_conv_stage(kinds: list[str], skip: int, dtype: torch.dtype) -> None:
    """The output and every gradient of a whole stage."""
    x, weights, biases, table = _stage(len(kinds), skip, 16 if kinds[0] == "same" else 8, dtype)
    count = len(kinds)

    def run(impl: str) -> Callable[..., Tensor]:
        def stage(x: Tensor, *rest: Tensor) -> Tensor:
            last = rest[-1] if skip else None
            return conv_stage(
                x, rest[:count], rest[count : 2 * count], kinds=kinds, skip=last, impl=impl
            )  # alpha 1: any other makes the derivative jump at 0, and an inner value may be rounded across

        return stage

    inputs = [x, *weights, *biases, *([table] if skip else [])]
    if skip:
        size = 8
        for kind in kinds:
            size = {"same": size, "down": size // 2, "up": 2 * size}[kind]
        inputs[0] = random_tensor(2, x.shape[1], 8, 8, seed=1, dtype=dtype)
    check(run("fused"), run("reference"), inputs, factor=4.0 if "up" in kinds and dtype != torch.float32 else 2.0)


def _stage(
    count: int, skip: int, channels: int, dtype: torch.dtype
) -> tuple[Tensor, list[Tensor], list[Tensor], Tensor]:
    widths = [channels + 4 * number for number in range(count + 1)]
    weights = [random_tensor(b, a, 3, 3, seed=10 + a, dtype=dtype, scale=(9 * a) ** -0.5) for a, b in pairwise(widths)]
    biases = [random_tensor(b, seed=30 + b, dtype=dtype) for b in widths[1:]]
    table = random_tensor(2, 3, 3, max(skip, 1), max(skip, 1), widths[-1], seed=4, dtype=dtype)
    return random_tensor(2, channels, 8, 6, seed=1, dtype=dtype), weights, biases, table


def test_a_stage_of_mixed_kernels_without_biases() -> None:
    weights = [random_tensor(8, 6, 1, 1, seed=1, scale=0.4), random_tensor(4, 8, 3, 3, seed=2, scale=0.2)]
    inputs = [random_tensor(2, 6, 5, 4, seed=3), *weights]
    check(
        lambda x, *w: conv_stage(x, w, impl="fused"),
        lambda x, *w: reference.conv_stage(x, w),
        inputs,
    )


def test_a_stage_takes_silu_and_folded_weights() -> None:
    x, weights, biases, _ = _stage(2, 0, 6, torch.float32)
    check(
        lambda x, a, b: conv_stage(x, (a, b), biases, kinds=("same", "up"), activation="silu", impl="fused"),
        lambda x, a, b: reference.conv_stage(
            x, (a, b), [v.to(x.dtype) for v in biases], kinds=("same", "up"), activation="silu"
        ),
        [x, *weights],
    )
    given = (fold_upsample(weights[0]), weights[1])
    folded = conv_stage(x, given, biases, kinds=("up", "same"), impl="fused")
    torch.testing.assert_close(folded, conv_stage(x, weights, biases, kinds=("up", "same"), impl="reference"))


@pytest.mark.skipif(not ON_GPU, reason="the interpreter cannot be captured")
@pytest.mark.parametrize("kinds", [["same", "same"], ["same", "down"], ["same", "up"]])
def test_a_stage_is_captured_as_a_graph(kinds: list[str]) -> None:
    x, weights, biases, _ = _stage(2, 0, 16, torch.bfloat16)
    leaves = [value.requires_grad_() for value in (x, *weights)]
    biases = [bias.float() for bias in biases]

    def step() -> list[Tensor]:
        return list(torch.autograd.grad(conv_stage(x, weights, biases, kinds=kinds, impl="fused").sum(), leaves))

    expected: list[Tensor] = []
    side = torch.cuda.Stream()
    with torch.cuda.stream(side):
        for _ in range(3):
            expected = step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for value in captured:
        value.zero_()
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, expected, strict=True))
