"""What a run asks: cases as plain data that travels to child processes, and those of the numerics and the hunt."""

from __future__ import annotations

import itertools
import random
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastbegan_kernels.fold import KINDS as FOLDS
from fastbegan_kernels.fused.launch import product_of
from fastbegan_kernels.fused.tiles import AnyTile, Product, Tile, TmaTile, pointer_tiles, tiles_for, tma_tiles
from fastbegan_kernels.problems import POINTWISE
from fastbegan_kernels.tiers import KINDS

DRY = "--dry" in sys.argv
# the scripts gpu_*.py insist on a GPU; the suites bench_*.py run anywhere
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() and not DRY else torch.device("cpu")
ON_CPU = DEVICE.type == "cpu"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
MODES = ("fp16", "fp32") if DRY else ("bf16", "fp16", "fp32", "tf32")  # the interpreter multiplies bf16 wrongly
EXACT = ("bf16", "fp16", "fp32")  # kernels without a matrix product
PIXELWISE = ("activation", *POINTWISE)
CHANNELS = (16,) if DRY else (128, 64)
SAMPLES = 1 if DRY else 16
# sides of a layer's input; with them the timings find in the compiler's cache what they need, for every size of theirs
SIDES = {kind: (4,) if DRY else (32, 16, 8, 4) if kind == "up" else (32, 16, 8) for kind in KINDS}
Outcome = dict[str, Any]
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Case:
    """One thing to check, to try or to time; all fields are plain."""

    part: str  # facts, check, pointwise, tuning or time
    op: str = ""
    mode: str = "fp32"
    shape: Shape = ()  # N, C, H, W, K; H and W are the input's, also of an up-convolution
    tile: str = ""  # the name of the one to check
    tiles: tuple[str, ...] = ()  # the names of those to time
    backward: bool = False  # check a layer's input gradient
    taps: int = 3
    skip: int = 0  # side of a skip table, none where 0
    activation: str = "elu"
    alpha: float = 1.0
    eta: int = 1
    bias: str = "own"  # own: of the data's type; float32; none
    extra: bool = True  # previous output, index and flip, gradient to the target, flag to change nothing
    compilers: tuple[str, ...] = ()  # modes of torch.compile to time as well
    seed: int = 0
    needs: float = 0.0  # seconds without which it is not worth beginning

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.mode]

    @property
    def weight_shape(self) -> Shape:
        """Of a layer's packed weight."""
        _, c, _, _, k = self.shape
        return (c, k, 4, 4) if self.op == "up" else (k, c, self.taps, self.taps)

    @property
    def product(self) -> Product:
        """What computes this layer, or its input gradient."""
        return product_of(self.shape[:4], self.weight_shape, self.op, backward=self.backward)


def case_of(fields: dict[str, Any]) -> Case:
    """A case that has been JSON."""
    plain: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Case(**plain)


def named(error: BaseException) -> str:
    """An error in one line of a table."""
    return f"{type(error).__name__}: {error}"[:300]


def tile_of(name: str) -> AnyTile:
    """The tile of a name, shipped or not: its numbers are the tile's fields in their order."""
    tile = (TmaTile if name.startswith("tma") else Tile)(*map(int, re.findall(r"\d+", name)))
    if tile.name != name:
        raise ValueError(f"tile is {name!r}; accepted: names like {tile.name!r}")
    return tile


def tile_names(mode: str, capability: int) -> list[str]:
    """Every tile that ships for an architecture; dry: the smallest, and a TMA tile that suits the interpreter."""
    pointer, tma = pointer_tiles(DTYPES[mode], capability), tma_tiles(DTYPES[mode], capability)
    if DRY:
        pointer, tma = pointer[-1:], (TmaTile(1, 4, 4, 16, 16, 4, 2),) if mode == "fp16" else ()
    return [tile.name for tile in (*pointer, *tma)]


def takes(tile: AnyTile, case: Case, capability: int) -> bool:
    """Whether a tile can be asked for a case: odd channel counts are only ever given to the last pointer tile."""
    if isinstance(tile, TmaTile):
        return case.product.fits(tile)
    return case.product.aligned or tile == pointer_tiles(case.dtype, capability)[-1]


def worth_trying(case: Case, capability: int) -> list[str]:
    """What the package itself would measure for a layer, the one that it uses unmeasured first."""
    return [tile.name for tile in tiles_for(case.product, case.dtype, capability, descriptors=True)]


# nothing divides by a tile; TMA tiles take the first that they can, forward and backward
_ODD: dict[str, list[Shape]] = {
    "same": [(3, 72, 7, 9, 88), (3, 136, 7, 9, 136), (3, 136, 17, 19, 136)],
    "down": [(3, 72, 7, 9, 88), (3, 128, 6, 10, 136), (3, 128, 34, 38, 136)],
    "up": [(3, 72, 7, 9, 88), (3, 136, 6, 5, 128), (3, 136, 17, 19, 128)],
}
_ODD_DRY: dict[str, list[Shape]] = {
    "same": [(1, 24, 5, 6, 8)],
    "down": [(1, 24, 5, 6, 8), (1, 16, 6, 4, 8)],
    "up": [(1, 8, 3, 5, 8), (1, 8, 3, 5, 16)],
}
_SLOW = ("fold", "skip_gradient") if DRY else ()  # to interpret
_UPDATES = ((True, 0), (False, 0), (False, 1))  # without a flag to skip it, with one, with one that is not set
_LEFT_OVER: list[Shape] = [(3, 70, 6, 5, 66), (2, 20, 7, 9, 12), (1, 3, 16, 16, 24), (2, 32, 5, 5, 3), (1, 5, 1, 1, 7)]


def square_cases(kind: str, mode: str, name: str, capability: int) -> list[Case]:
    """Layers as networks have them; in the timings' data type at every size that is compiled anew."""
    found: list[Case] = []
    if DRY and mode != MODES[0]:
        return found
    for n, side in itertools.product(CHANNELS, SIDES[kind]):
        base = Case("check", kind, mode, (SAMPLES, n, side, side, n), name)
        cases = [base, replace(base, bias="float32"), replace(base, backward=True, extra=False)]
        cases += [replace(base, backward=True)] if side >= 16 or DRY else []  # stages are timed at these sizes only
        cases = [case for case in cases if takes(tile_of(name), case, capability)]
        if side != SIDES[kind][0]:
            cases = [case for case in cases if name in worth_trying(case, capability)]
        found += cases
        if len(cases) >= 4 and mode != MODES[0]:
            break
    return found


def odd_cases(kind: str, mode: str, name: str, capability: int) -> list[Case]:
    """Every variant of a layer on sizes that no block divides."""
    for shape in (_ODD_DRY if DRY else _ODD)[kind]:
        base = Case("check", kind, mode, shape, name, alpha=0.7)
        back = replace(base, backward=True)
        if not (takes(tile_of(name), base, capability) and takes(tile_of(name), back, capability)):
            continue
        cases = [base, replace(base, bias="none"), back, replace(back, extra=False)]
        if kind == "up":
            return [*cases, replace(base, skip=table_sizes(2 * shape[2], 2 * shape[3])[-1])]
        small = [replace(base, taps=1), *([replace(back, taps=1)] if kind == "same" else [])]
        return cases + small
    return []


def left_over_cases(kind: str, mode: str, capability: int) -> list[Case]:
    """Channel counts that are no multiples of 8, by the only tile that ever gets them."""
    name = pointer_tiles(DTYPES[mode], capability)[-1].name
    cases: list[Case] = []
    for shape in [(1, 5, 3, 4, 3)] if DRY else _LEFT_OVER:
        base = Case("check", kind, mode, shape, name)
        cases += [base, replace(base, backward=True)]
    cases += [replace(cases[0], taps=1)] if kind != "up" else []
    return cases


def numeric_groups(capability: int) -> Iterator[list[Case]]:
    """Every kernel, mode and tile, what will be timed first: a child per tile, and there per kind of layer as well."""
    yield pixelwise_cases()
    for mode in MODES:
        last = pointer_tiles(DTYPES[mode], capability)[-1].name
        for name in tile_names(mode, capability):
            groups: list[list[Case]] = []
            for kind in KINDS:
                cases = square_cases(kind, mode, name, capability) + odd_cases(kind, mode, name, capability)
                groups.append(cases + (left_over_cases(kind, mode, capability) if name == last else []))
            yield from groups if mode == MODES[0] else [list(itertools.chain.from_iterable(groups))]


def pixelwise_cases() -> list[Case]:
    """Kernels without a matrix product: the package's own problems, and larger and odder shapes."""
    cases = [Case("pointwise", op, mode) for op in POINTWISE if op not in _SLOW for mode in EXACT]
    sizes = [(2, 3, 4, 4, 5)] if DRY else [(16, 3, 64, 64, 128), (3, 3, 7, 5, 20), (1, 5, 1, 1, 3)]
    for op, mode, shape in itertools.product(PIXELWISE, EXACT, sizes):
        base = Case("check", op, mode, shape)
        less = replace(base, activation="leaky_relu", alpha=0.3, eta=2, bias="none", extra=False)
        if op == "skip_gradient":
            cases += [replace(base, skip=size) for size in table_sizes(*shape[2:4])]
        elif op == "activation":
            cases += [less, *(replace(base, skip=size) for size in (0, *table_sizes(*shape[2:4])[-1:]))]
        elif op == "l1_reconstruction_loss":
            cases += [base, less, replace(base, eta=2), replace(base, extra=False)]
        else:
            cases += [base, less]
    update = Case("check", "equilibrium_update")
    cases = [case for case in cases if case.op not in _SLOW or case.mode == MODES[0]]
    cases = [case for case in cases if case.op != "equilibrium_update" or case.mode == "fp32"]
    return cases + [
        replace(update, shape=(n,) * 5, extra=extra, seed=seed) for n in (1, 16, 300) for extra, seed in _UPDATES
    ]


def table_sizes(height: int, width: int) -> list[int]:
    """Sides of skip tables whose cells are at least 2x2 pixels of a map."""
    return [size for size in range(1, min(height, width) // 2 + 1) if height % size == 0 == width % size]


def hunted(seed: int, count: int, capability: int) -> list[Case]:
    """Random odd cases."""
    rng = random.Random(seed)
    cases = (
        _random_layer(rng, capability) if rng.random() < 0.65 else _random_pixelwise(rng) for _ in range(count)
    )  # fmt: skip
    return [replace(case, seed=1000 * seed + number) for number, case in enumerate(cases)]


def _random_shape(rng: random.Random) -> Shape:
    """Few pixels; channels of any number, or multiples of 8."""
    any_number = [1, 2, 3, 5, 8, 9] if DRY else [1, 2, 3, 5, 15, 16, 17, 31, 33, 48, 63, 65, 96, 127, 128, 130, 257]
    eights = [8, 16, 32] if DRY else [8, 16, 24, 40, 64, 72, 96, 128, 136, 192, 256]
    high, wide = (rng.choice([1, 2, 3, 4, rng.randint(1, 5 if DRY else 37)]) for _ in range(2))
    channels = rng.choice((any_number, eights))
    return rng.choice([1, 1, 2, 3, 5]), rng.choice(channels), high, wide, rng.choice(channels)


def _random_settings(rng: random.Random) -> dict[str, Any]:
    return {
        "activation": rng.choice(["elu", "elu", "relu", "leaky_relu", "none"]), "alpha": rng.choice([1.0, 0.3]),
        "bias": rng.choice(["own", "float32", "none"]), "extra": rng.random() < 0.7, "eta": rng.choice([1, 2]),
    }  # fmt: skip


def _random_layer(rng: random.Random, capability: int) -> Case:
    """By any tile that takes it, or one that the package would use or measure."""
    kind, backward = rng.choice(KINDS), rng.random() < 0.5
    taps = 3 if kind == "up" or (kind == "down" and backward) else rng.choice([1, 3, 3])
    shape = _random_shape(rng)
    if kind == "down" and rng.random() < 0.5:  # descriptor kernels take even sizes only
        shape = (*shape[:2], 2 * shape[2], 2 * shape[3], shape[4])
    tables = table_sizes(2 * shape[2], 2 * shape[3]) if kind == "up" and not backward else []
    skip = rng.choice([0, *tables])
    case = Case(
        "check", kind, rng.choice(MODES), shape, backward=backward, taps=taps, skip=skip, **_random_settings(rng)
    )
    names = [name for name in tile_names(case.mode, capability) if takes(tile_of(name), case, capability)]
    tma = [name for name in names if name.startswith("tma")]  # few sizes suit one
    return replace(case, tile=rng.choice(rng.choice((tma or names, names, worth_trying(case, capability)))))


def _random_pixelwise(rng: random.Random) -> Case:
    op, shape = rng.choice([op for op in PIXELWISE if op not in _SLOW]), _random_shape(rng)
    tables = table_sizes(*shape[2:4])
    if op == "skip_gradient" and not tables:
        op = "activation_backward"
    if op == "activation":
        tables.insert(0, 0)
    skip = rng.choice(tables) if op in ("activation", "skip_gradient") else 0
    mode = "fp32" if op == "equilibrium_update" else rng.choice(EXACT)
    return Case("check", op, mode, shape, skip=skip, **_random_settings(rng))


def fold_kinds(case: Case) -> list[str]:
    """Which packed forms a check of `fold` makes, in what order: all, or a random few."""
    return list(FOLDS) if case.extra else random.Random(case.seed).choices(FOLDS, k=4)
