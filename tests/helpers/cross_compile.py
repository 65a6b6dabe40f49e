"""Compile every shipped kernel configuration for absent GPUs. Run as a program, without the interpreter.

Prints a JSON list: kernel, configuration, architecture, registers, stack, shared memory, and counts of the machine
instructions that tell whether the matrix units and asynchronous copies are used.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbegan_kernels.fused import (
    activation,
    conv_pointer,
    conv_tma,
    equilibrium_update,
    fold,
    group_norm_silu,
    l1_reconstruction_loss,
    normalize_images,
    skip_phase_table,
)
from fastbegan_kernels.fused.conv import Product
from fastbegan_kernels.fused.conv_tiles import AnyTile, Tile, TmaTile, pointer_tiles, suits, tma_tiles
from tests.helpers.tile_model import loop_figures

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTIONS = ("HMMA", "HGMMA", "FFMA", "LDGSTS", "UTMALDG", "LDSM", "LDL", "STL")
Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int], tuple[str, ...]]


_PRODUCTS = (  # name, transposed convolution, kernel, stride, weights turned, with the backward epilogue
    ("conv forward", False, 3, 1, False, False),
    ("conv forward stride 2", False, 3, 2, False, False),
    ("conv input gradient", False, 3, 1, True, True),
    ("conv stride 2 input gradient", True, 3, 1, False, True),
    ("upconv forward", True, 4, 1, False, False),
    ("upconv forward with skip", True, 4, 1, False, False),
    ("upconv input gradient", False, 4, 2, False, True),
)


def _matrix_cases(name: str, tiles: Sequence[AnyTile], channels: str = "", capability: int = 80) -> Iterator[Case]:
    """Every product by every tile; `name` is a data type, or tf32.

    `channels` is "left over" where the last block of channels is partly empty, "odd" where they come one by one.
    """
    full = not channels
    data = f"*{'fp32' if name == 'tf32' else name}"
    for tile in tiles:
        tma = isinstance(tile, TmaTile)
        blocks: dict[str, Any] = {"BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c, "STAGES": tile.stages}
        if isinstance(tile, TmaTile):
            blocks |= {"SAMPLES": tile.samples, "HEIGHT": tile.height, "WIDTH": tile.width}
        else:
            blocks |= {
                "BLOCK_M": tile.block_m,
                "FULL_C": full,
                "ALIGNED": channels != "odd",
                "PRECISION": "tf32" if name == "tf32" else "ieee",
            }
        for label, transpose, kernel, stride, turned, backward in _PRODUCTS:
            skip = 8 if "skip" in label else 0
            sizes = (1, 2 * tile.block_c, tile.block_k, 8, 8, 8, 8)
            product = Product(transpose, turned, stride, kernel, backward, skip > 0, *sizes)
            if (tile.flat and not transpose) or (isinstance(tile, Tile) and not suits(product, tile, capability)):
                continue
            constants = blocks | {"KERNEL": kernel, "HAS_BIAS": not backward, "ACTIVATION": "elu", "BACKWARD": backward}
            if transpose:
                constants |= {"SKIP_SIZE": skip, "FLAT": tile.flat}
            else:
                constants |= {"STRIDE": stride, "PAD": 1, "TURNED": turned}
            absent = ["b_ptr"] if backward else ["db_ptr", "y_prev_desc" if tma else "y_prev_ptr"]
            absent += ["skip_ptr"] if transpose and not skip else []
            signature = dict.fromkeys(("batch", "pixels", "in_h", "in_w", "out_h", "out_w", "c_blocks"), "i32")
            signature |= {"C": "i32", "K": "i32", "alpha": "fp32", "b_ptr": "*fp32", "db_ptr": "*fp32"}
            signature |= dict.fromkeys(("x_ptr", "w_ptr", "skip_ptr", "y_prev_ptr", "out_ptr"), data)
            if isinstance(tile, TmaTile):
                signature |= _descriptors(tile, name, transpose, stride, transpose or turned)
                code = conv_tma._conv_transpose_tma_kernel if transpose else conv_tma._conv_tma_kernel
            else:
                code = conv_pointer._conv_transpose_kernel if transpose else conv_pointer._conv_kernel
            options = {"num_warps": tile.warps, "num_stages": tile.stages}
            missing = f", channels {channels}" if channels else ""
            yield (
                f"{label} {name} {tile.name}{missing}",
                code,
                signature,
                constants | dict.fromkeys(absent),
                options,
                ("C", "K") if channels != "odd" else (),
            )


def _descriptors(tile: TmaTile, name: str, transpose: bool, stride: int, first: bool) -> dict[str, str]:
    def described(*block: int) -> str:
        return f"tensordesc<{name}[{', '.join(map(str, block))}]>"

    def image(channels: int, halves: bool) -> str:
        middle = (tile.height, 1, tile.width) if halves else (tile.height, tile.width)
        return described(tile.samples, *middle, channels)

    weight = (tile.block_c, tile.block_k) if first else (tile.block_k, tile.block_c)
    written = image(tile.block_k, transpose)
    x = image(tile.block_c, stride == 2)
    return {"x_desc": x, "w_desc": described(*weight), "out_desc": written, "y_prev_desc": written}


def _elementwise_cases(dtype: str) -> Iterator[Case]:
    data = f"*{dtype}"
    rows = {"ACTIVATION": "elu", "BLOCK_M": 16, "BLOCK_K": 128}
    for skip in (0, 8):
        yield (
            f"activation{' with skip' if skip else ''} {dtype}",
            activation._activation_kernel,
            {"y_ptr": data, "b_ptr": "*fp32", "skip_ptr": data, "alpha": "fp32"}
            | dict.fromkeys(("rows", "height", "width", "K"), "i32"),
            rows | {"HAS_BIAS": True, "SKIP_SIZE": skip} | ({} if skip else {"skip_ptr": None}),
            {},
            # a map with a phase table of eight by eight cells has a multiple of 64 pixels
            ("K", "rows") if skip else ("K",),
        )
    yield (
        f"activation backward {dtype}",
        activation._activation_backward_kernel,
        {
            "grad_ptr": data,
            "y_ptr": data,
            "out_ptr": data,
            "db_ptr": "*fp32",
            "rows": "i32",
            "K": "i32",
            "alpha": "fp32",
        },
        rows,
        {},
        ("K",),
    )
    yield (
        f"skip gradient {dtype}",
        skip_phase_table._skip_gradient_kernel,
        {"dz_ptr": data, "out_ptr": data} | dict.fromkeys(("height", "width", "K"), "i32"),
        {"SIZE": 8, "BLOCK_W": 16, "BLOCK_K": 32},
        {},
        ("K",),
    )
    for eta in (1, 2):
        for name, loss, gradient in (("loss", True, False), ("gradient", False, True), ("both", True, True)):
            pointers = dict.fromkeys(("prediction_ptr", "target_ptr", "d_prediction_ptr", "d_target_ptr"), data)
            absent = [] if gradient else ["scale_ptr", "d_prediction_ptr", "d_target_ptr"]
            absent += [] if loss else ["partial_ptr"]
            yield (
                f"l1 {name} eta {eta} {dtype}",
                l1_reconstruction_loss._l1_kernel,
                pointers | {"scale_ptr": "*fp32", "partial_ptr": "*fp32", "values": "i32"},
                {"ETA": eta, "LOSS": loss, "GRADIENT": gradient, "TO_TARGET": gradient, "BLOCK": 1024}
                | dict.fromkeys(absent),
                {},
                ("values",),
            )
    for windows in (False, True):
        yield (
            f"normalize images{', windows' if windows else ''} {dtype}",
            normalize_images._normalize_images_kernel,
            {"images_ptr": "*u8", "index_ptr": "*i64", "flip_ptr": "*u8", "corner_ptr": "*i64", "out_ptr": data}
            | dict.fromkeys(("height", "width", "margin"), "i32"),
            {"C": 3, "HAS_INDEX": True, "HAS_FLIP": True, "HAS_MARGIN": windows, "BLOCK": 1024}
            | ({} if windows else {"corner_ptr": None}),
            {},
            (),
        )
    for backward in (False, True):
        yield (
            f"fold{' backward' if backward else ''} {dtype}",
            fold._unfold_kernel if backward else fold._fold_kernel,
            {"table_ptr": "*i64", "owner_ptr": "*i32", "packed_ptr": data, "gradient_ptr": "*fp32"},
            {"BLOCK": fold._FOLD_BLOCK},
            {},
            (),
        )


def _group_norm_cases(dtype: str) -> Iterator[Case]:
    data = f"*{dtype}"
    statistics = {"mean_ptr": "*fp32", "rstd_ptr": "*fp32", "weight_ptr": data, "bias_ptr": data}
    numbers = dict.fromkeys(("pixels", "splits", "C", "depth"), "i32")
    maps = {"x_ptr": data, "y_ptr": data, "grad_ptr": data, "dx_ptr": data}
    tile, split = {"M": group_norm_silu._PIXELS, "K": group_norm_silu._CHANNELS}, {"ROWS": group_norm_silu._ROWS}
    flags = {"HAS_WEIGHT": True, "HAS_BIAS": True, "SILU": True} | tile
    parts = dict.fromkeys(("square_ptr", "group_mean_ptr", "group_rstd_ptr", "bias_sum_ptr", "weight_sum_ptr"), "*fp32")
    parts |= {"along_one_ptr": "*fp32", "along_x_ptr": "*fp32", "eps": "fp32"}
    given = maps | statistics | parts | numbers
    for name, kernel, constants in (
        ("moments", group_norm_silu._moments_kernel, tile | split),
        ("combine", group_norm_silu._combine_kernel, split | {"BLOCK": group_norm_silu._PARTS}),
        ("apply", group_norm_silu._apply_kernel, flags),
        ("gradient sums", group_norm_silu._gradient_sums_kernel, flags | split),
        ("gradient", group_norm_silu._gradient_kernel, flags),
    ):
        yield f"group norm {name} {dtype}", kernel, given, constants, {}, ("C",)


def cases(capability: int) -> Iterator[Case]:
    """All shipped kernels for an architecture: elementwise ones everywhere, matrix products from Ampere on.

    Of sm_103 and sm_120 only matrix products by one tile of each kind: they are what other architectures compile.
    """
    if capability in (103, 120):
        yield from _matrix_cases(
            "bf16", [pointer_tiles(torch.bfloat16, capability)[0], TmaTile(1, 8, 16, 64, 64, 4, 4)]
        )
        return
    yield (
        "equilibrium update",
        equilibrium_update._equilibrium_update_kernel,
        {
            "real_ptr": "*fp32",
            "fake_ptr": "*fp32",
            "skip_ptr": "*u8",
            "k_ptr": "*fp32",
            "sums_ptr": "*fp32",
            "window_ptr": "*fp64",
            "samples": "i32",
            "gamma": "fp32",
            "lambda_k": "fp32",
        },
        {"HAS_SKIP": True, "BLOCK": 256},
        {},
        (),
    )
    for dtype in ("fp32",) if capability < 80 else ("fp32", "bf16"):
        yield from _elementwise_cases(dtype)
        yield from _group_norm_cases(dtype)
    if capability < 80:
        return
    pointer = pointer_tiles(torch.bfloat16, capability)
    exact = pointer_tiles(torch.float32, capability)
    by_descriptors = tma_tiles(torch.bfloat16, capability)
    yield from _matrix_cases("bf16", pointer, capability=capability)
    yield from _matrix_cases("bf16", [Tile(128, 64, 64, 4, 3)], "left over", capability=capability)
    yield from _matrix_cases("bf16", pointer[-1:], "odd", capability=capability)
    yield from _matrix_cases("fp16", pointer[:1], capability=capability)
    yield from _matrix_cases("fp32", exact, capability=capability)
    yield from _matrix_cases("fp32", exact[-1:], "odd", capability=capability)
    yield from _matrix_cases("tf32", exact[:2], capability=capability)
    yield from _matrix_cases("bf16", by_descriptors, capability=capability)
    yield from _matrix_cases("fp16", by_descriptors[:1], capability=capability)
    flat = [replace(tile, flat=True) for tile in (*pointer, *by_descriptors)]
    yield from _matrix_cases("bf16", flat, capability=capability)
    yield from _matrix_cases("fp32", [replace(tile, flat=True) for tile in exact], capability=capability)


def measure(case: Case, capability: int) -> dict[str, Any]:
    """Registers, stack and shared memory in bytes, and instruction counts of one compiled kernel."""
    name, kernel, given, constants, options, by_16 = case
    signature = {n: "constexpr" if n in constants else given[n] for n in kernel.arg_names}
    pointers = {
        (i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n].startswith("*") or n in by_16
    }
    fixed = {(list(signature).index(n),): value for n, value in constants.items()}
    source = ASTSource(kernel, signature, fixed, pointers)
    compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    with tempfile.TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled.asm["cubin"])
        usage = subprocess.run([_TOOL, "--dump-resource-usage", binary], capture_output=True, text=True, check=True)
        # CUDA 13's tool no longer disassembles Pascal: no instructions are counted there
        machine = subprocess.run(
            [_TOOL, "-sass", binary], capture_output=True, text=True, check=capability >= 75
        ).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout)
    assert found is not None, usage.stdout
    counts = {word: len(re.findall(rf"\b{word}\b", machine)) for word in _INSTRUCTIONS}
    if "tma" in name:  # loads into registers between the first and the last product would mean operands not in place
        products = [found.start() for found in re.finditer(r"\bHGMMA\b", machine)]
        counts["LDSM"] = len(re.findall(r"\bLDSM\b", machine[products[0] : products[-1]])) if products else 0
    registers, shared = int(found[1]), compiled.metadata.shared
    matrix = loop_figures(machine, name, capability, registers, shared) if "conv" in name else {}
    return {
        "kernel": name,
        "sm": capability,
        "registers": registers,
        "stack": int(found[2]),
        "shared": shared,
        **counts,
        **matrix,
    }


def main() -> None:
    """Arguments: an architecture, and optionally a part of the names to compile."""
    sm, *wanted = sys.argv[1:]
    chosen = [case for case in cases(int(sm)) if not wanted or wanted[0] in case[0]]
    print(json.dumps([measure(case, int(sm)) for case in chosen]))


if __name__ == "__main__":
    main()
