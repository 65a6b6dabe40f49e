"""Every tile that ships for this device against float64, forward and backward, on even, odd and random shapes.

On a CPU the interpreter runs the same code with small shapes, as if on sm_90. The tolerance is that of
`fastbegan_kernels.problems`; results of two runs must be equal to the bit.
"""

from __future__ import annotations

import random
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from fastbegan_kernels import problems, tuning
from fastbegan_kernels.conv_layer import KINDS, Layer
from fastbegan_kernels.problems import FUSED, Form, Pointwise, Problem

conv = pytest.importorskip("fastbegan_kernels.fused.conv")
from fastbegan_kernels.fused import conv_tiles as tiles  # noqa: E402

ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if ON_GPU else torch.device("cpu")
CAPABILITY = conv.capability_of(DEVICE)
pytestmark = pytest.mark.skipif(CAPABILITY < 80, reason="no tile ships for this GPU")
# the interpreter multiplies bf16 wrongly, and has no TF32
MODES = {"bf16": "bfloat16", "fp16": "float16", "float32": "float32", "tf32": "float32"}
MODES = {mode: name for mode, name in MODES.items() if ON_GPU or mode in ("fp16", "float32")}
Shape = tuple[int, int, int, int, int]  # N, C, H, W, K; H and W of a layer's input
WIDE: dict[str, Shape] = {kind: (1, 128, side, side, 128) for kind, side in zip(KINDS, (16, 32, 16), strict=True)}
SQUARE: list[Shape] = [(16, n, side, side, n) for n in (128, 64) for side in (32, 16, 8, 4)]
ODD: dict[str, list[Shape]] = {  # nothing divides by a tile; the last two suit descriptors
    "same": [(3, 72, 7, 9, 88), (3, 136, 7, 9, 136), (3, 136, 17, 19, 136)],
    "down": [(3, 72, 7, 9, 88), (3, 128, 6, 10, 136), (3, 128, 34, 38, 136)],
    "up": [(3, 72, 7, 9, 88), (3, 136, 6, 5, 128), (3, 136, 17, 19, 128)],
}
NARROW: list[Shape] = [(3, 70, 6, 5, 66), (2, 20, 7, 9, 12), (1, 3, 16, 16, 24), (2, 32, 5, 5, 3), (1, 5, 1, 1, 7)]
if not ON_GPU:
    SQUARE = [(2, 64, 4, 4, 64)]
    ODD = {"same": [(1, 24, 5, 6, 8)], "down": [(1, 64, 6, 4, 8)], "up": [(1, 8, 3, 5, 64)]}
    NARROW = [(1, 5, 3, 4, 3)]


def _tiles(dtype: str) -> list[tiles.AnyTile]:
    values = problems.dtype_named(dtype)
    return [*tiles.pointer_tiles(values, CAPABILITY), *tiles.tma_tiles(values, CAPABILITY)]


def _problem(kind: str, mode: str, shape: Shape, taps: int = 3, *, backward: bool = False) -> Layer:
    batch, channels, height, width, outputs = shape
    weight = (channels, outputs, 4, 4) if kind == "up" else (outputs, channels, taps, taps)
    x = (batch, channels, height, width)
    return Layer(kind, backward, MODES[mode], x, weight, alpha=0.7, tf32=mode == "tf32")


def _takes(problem: Layer, tile: tiles.AnyTile) -> bool:
    """Whether a launcher may ask this tile for this layer: channels that are no multiples of 8 get the last one."""
    product = conv.product_of(problem.x, problem.weight, problem.kind, problem.backward)
    if isinstance(tile, tiles.TmaTile):
        return tiles.fits(product, tile)
    return product.aligned or tile == tiles.pointer_tiles(problems.dtype_named(problem.dtype), CAPABILITY)[-1]


def _tables(problem: Layer) -> list[int]:
    """Sides of skip tables whose cells are at least 2x2 pixels of an up-convolution's output."""
    height, width = (2 * side for side in problem.x[2:])
    return [size for size in range(1, min(height, width) // 2 + 1) if height % size == 0 == width % size]


def _layers(kind: str, mode: str, *, wide: bool) -> Iterator[Layer]:
    """Layers of the networks (or a `wide` one), for the first mode of all sizes; odd and narrow ones in variants."""
    squares = SQUARE if mode == next(iter(MODES)) else SQUARE[:2]
    for shape in (*([WIDE[kind]] if wide else squares), *ODD[kind], *NARROW):
        forward = _problem(kind, mode, shape)
        backward = replace(forward, backward=True)
        yield from (forward, backward)
        if shape in ODD[kind]:
            yield from (replace(forward, bias=False, activation="leaky_relu"), replace(backward, activation=None))
            if kind == "up":
                yield replace(forward, skip=_tables(forward)[-1])
            else:
                yield _problem(kind, mode, shape, 1)
            if kind == "same":
                yield _problem(kind, mode, shape, 1, backward=True)


def _check(problem: Problem, form: Form) -> None:
    own, exact = problem.expected(DEVICE)
    first, second = problem.results(form, DEVICE), problem.results(form, DEVICE)
    worst = max(problems.excess(*three, tf32=problem.tf32) for three in zip(first, own, exact, strict=True))
    assert worst <= 1, f"{problem} by {form.name}: {worst:.3g} times the allowed error"
    assert all(map(torch.equal, first, second)), f"{problem} by {form.name}: two runs differ"


@pytest.fixture
def _tf32(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", request.getfixturevalue("mode") == "tf32")


def _cases() -> Iterator[Any]:
    """Kind, mode and tile; without a GPU all but the narrowest tiles of half precision are slow."""
    for mode, dtype in MODES.items():
        for tile in _tiles(dtype):
            fast = ON_GPU or (mode == "fp16" and tile in (tiles.HALF[-1], tiles.TMA[-1]))
            for kind in KINDS:
                marks = () if fast and (ON_GPU or kind == "same") else pytest.mark.slow
                yield pytest.param(kind, mode, tile.name, id=f"{kind}-{mode}-{tile.name}", marks=marks)


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize(("kind", "mode", "name"), list(_cases()))
def test_a_tile(kind: str, mode: str, name: str) -> None:
    tile = tiles.tile_named(name)
    # the smallest layer that suits every tile; too many programs of a narrow one for the interpreter
    wide = not ON_GPU and (tile.block_k == 128 or isinstance(tile, tiles.TmaTile))
    suited = [problem for problem in _layers(kind, mode, wide=wide) if _takes(problem, tile)]
    assert suited
    for problem in suited:
        _check(problem, tile)


@pytest.mark.skipif(not ON_GPU, reason="the interpreter cuts bf16 off where GPUs round")
@pytest.mark.parametrize("op", [op for op in problems.POINTWISE if op != "equilibrium_update"])
def test_a_kernel_without_a_product_in_bf16(op: str) -> None:
    """The other types are in test_tuning.py."""
    _check(Pointwise(op, "bfloat16"), FUSED)


def _random(rng: random.Random, mode: str) -> Layer:
    """Few pixels; channels of any number, or multiples of 8."""
    kind, backward = rng.choice(KINDS), rng.random() < 0.5
    any_number = [1, 2, 3, 5, 15, 16, 17, 31, 33, 48, 63, 65, 96, 127, 128, 130, 257] if ON_GPU else [1, 2, 3, 5, 9]
    eights = [8, 16, 24, 40, 64, 72, 96, 128, 136, 192, 256] if ON_GPU else [8, 16, 64]
    channels = rng.choice((any_number, eights))
    height, width = (rng.choice((1, 2, 3, 4, rng.randint(1, 37 if ON_GPU else 5))) for _ in range(2))
    if kind == "down" and rng.random() < 0.5:  # descriptors want even sizes
        height, width = 2 * height, 2 * width
    shape = (rng.choice((1, 1, 2, 3, 5)), rng.choice(channels), height, width, rng.choice(channels))
    taps = 3 if kind == "up" or (kind == "down" and backward) else rng.choice((1, 3, 3))
    problem = _problem(kind, mode, shape, taps, backward=backward)
    activation = rng.choice(("elu", "elu", "relu", "leaky_relu", "none"))
    skip = rng.choice((0, *_tables(problem))) if kind == "up" and not backward else 0
    return replace(problem, activation=activation, alpha=rng.choice((1.0, 0.3)), bias=rng.random() < 0.7, skip=skip)


@pytest.mark.usefixtures("_tf32")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("seed", range(4) if ON_GPU else [0, pytest.param(1, marks=pytest.mark.slow)])
def test_random_layers(seed: int, mode: str) -> None:
    rng = random.Random(f"{mode} {seed}")
    for _ in range(40 if ON_GPU else 6):
        problem = _random(rng, mode)
        suited = [tile for tile in _tiles(MODES[mode]) if _takes(problem, tile)]
        descriptors = [tile for tile in suited if isinstance(tile, tiles.TmaTile)]  # few sizes suit one
        _check(problem, rng.choice(rng.choice((descriptors or suited, suited))))


@pytest.mark.skipif(not ON_GPU, reason="nothing is chosen by measurement on a CPU")
@pytest.mark.parametrize("backward", [False, True])
def test_a_first_run_chooses_and_keeps(backward: bool) -> None:
    """With trials in a child process, as a user's first run does it, and without a warning."""
    warnings.simplefilter("error", RuntimeWarning)  # pytest resets it
    for problem in (_problem("up", "bf16", SQUARE[0], backward=backward), Pointwise("normalize_images", "bfloat16")):
        form = tuning.choose(problem, DEVICE, problem.forms(DEVICE, "auto"), "auto")
        assert form != problem.plain
        assert tuning.choices(DEVICE)["choices"][f"{problem!r} auto"] == form.name
        assert form.name in tuning.cache_file().read_text()
