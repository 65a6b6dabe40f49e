"""Layers to run matrix products on: halos everywhere, and the last block of everything partly empty."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from . import project
from .project import Layer, MatrixCase

_DTYPES = {"bf16": "bfloat16", "fp16": "float16"}
_LABELS = (
    "conv forward",
    "conv forward stride 2",
    "conv input gradient",
    "conv stride 2 input gradient",
    "upconv forward",
    "upconv forward with skip",
    "upconv input gradient",
)


def layer(
    case: MatrixCase, x: tuple[int, int, int, int], outputs: int, *, kernel: int = 3, activation: str | None = "elu"
) -> Layer:
    """The channels in `x` and `outputs` are those of the product: what is summed over, and its columns."""
    batch, channels, height, width = x
    a, b = (outputs, channels) if case.backward else (channels, outputs)  # the layer's own
    return Layer(
        case.kind,
        case.backward,
        _DTYPES.get(case.dtype, "float32"),
        (batch, a, height, width),
        (a, b, 4, 4) if case.kind == "up" else (b, a, kernel, kernel),
        skip=8 if case.has_skip else 0,
        activation=activation,
        alpha=0.7,
        tf32=case.dtype == "tf32",
    )


def gate_layers(case: MatrixCase) -> list[Layer]:
    """Two layers by which the launcher compiles a configuration of the gate."""
    if isinstance(case.tile, project.TmaTile):
        return list(_descriptor_layers(case, case.tile))
    block_c, block_k = case.tile.block_c, case.tile.block_k
    if case.channels == "odd":
        sizes = [(19, 21), (3, 40)]
    elif case.channels == "left over":
        sizes = [(block_c + 16, block_k + 16), (16, 16)]
    elif block_c == 16:
        sizes = [(48, 32), (16, 16)]
    else:
        sizes = [(2 * block_c, block_k + 16), (block_c, 16)]
    if case.has_skip:  # cells of an eighth
        maps = [(2, 8, 12), (1, 12, 8)]
    elif case.kind == "up":
        maps = [(3, 5, 7), (1, 9, 4)]
    else:
        maps = [(3, 9, 11), (2, 5, 8)]
    return [
        layer(case, (batch, summed, height, width), columns)
        for (summed, columns), (batch, height, width) in zip(sizes, maps, strict=True)
    ]


def _descriptor_layers(case: MatrixCase, tile: project.TmaTile) -> Iterator[Layer]:
    """Sizes that descriptor kernels take: samples, rows and columns left over, then one whole tile."""
    down = case.kind == "down"
    transpose = case.kind == ("down" if case.backward else "up")
    halves = not transpose and case.kind != "same"  # reads pairs of pixels: channels in whole blocks
    for whole in (False, True):
        batch = 1 if whole else tile.samples + 1
        height, width = (tile.height, tile.width) if whole else (tile.height + 1, tile.width + 3)
        columns = tile.block_k * (2 if transpose else 1) + (0 if transpose else 16)
        if whole:
            columns = tile.block_k
        summed = 64 if whole else 128 if halves else 144
        if case.has_skip and not whole:
            height, width = height // 4 * 4, (width + 3) // 4 * 4
        scale = 2 if down else 1
        yield layer(case, (batch, summed, scale * height, scale * width), columns)


def variants() -> Iterator[tuple[str, Layer, project.Tile]]:
    """Binaries that real networks compile but the gate does not: name, layer, tile."""
    small, middle = project.SMALL_HALF, project.MIDDLE_HALF

    def case(label: str, tile: project.Tile, dtype: str = "bf16") -> MatrixCase:
        return MatrixCase(label, dtype, tile, "")

    def x(label: str, channels: int) -> tuple[int, int, int, int]:
        return (2, channels, 8, 8) if "skip" in label else (2, channels, 7, 9)

    for label in _LABELS:  # to 3 channels or 1 and from them, as at both ends of a network
        for dtype, tile in (("bf16", small), ("fp32", project.SMALL_FULL)):
            made = case(label, tile, dtype)
            yield f"{label} {dtype} to image", layer(made, x(label, 64), 3), tile
            yield f"{label} {dtype} from image", layer(made, x(label, 3), 48), tile
            yield f"{label} {dtype} to grey", layer(made, x(label, 64), 1), tile
            yield f"{label} {dtype} from grey", layer(made, x(label, 1), 48), tile
        for tile in (middle, small):
            made = layer(case(label, tile), x(label, 72), 40)
            yield f"{label} bf16 multiples of 8 {tile.name}", made, tile
    for tile in (middle, small):
        size = (3, 2 * tile.block_c, 9, 11)
        for label in ("conv forward", "conv forward stride 2"):
            made = replace(layer(case(label, tile), size, 48, kernel=1, activation="none"), bias=False)
            yield f"{label} 1x1 {tile.name}", made, tile
        yield f"1x1 input gradient {tile.name}", layer(case("conv input gradient", tile), size, 48, kernel=1), tile
    for label in ("conv forward", "conv input gradient", "upconv forward with skip", "upconv input gradient"):
        for activation in ("relu", "leaky_relu", "none"):
            yield f"{label} {activation}", layer(case(label, middle), x(label, 64), 80, activation=activation), middle
    for label in ("conv input gradient", "conv stride 2 input gradient", "upconv input gradient"):
        made = layer(case(label, middle), x(label, 64), 80, activation=None)
        yield f"{label} without activation", made, middle
