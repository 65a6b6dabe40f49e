"""Compile every shipped kernel configuration for GPUs that are not here; run as a program, without the interpreter.

Prints a JSON list: kernel, configuration, architecture, registers, stack, shared memory, and counts of the machine
instructions that tell whether the matrix units and asynchronous copies are used.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from fastbegan_kernels.fused import elementwise, implicit_gemm
from fastbegan_kernels.fused.tiles import Tile, shipped_tiles

_TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
_INSTRUCTIONS = ("HMMA", "HGMMA", "FFMA", "LDGSTS", "LDL", "STL")
Case = tuple[str, Any, dict[str, str], dict[str, Any], dict[str, int]]


def _matrix_cases(dtype: str, tiles: tuple[Tile, ...]) -> Iterator[Case]:
    precision = "ieee" if dtype == "fp32" else "tf32"  # says nothing for half precision
    data, count = f"*{dtype}", "i32"
    for tile in tiles:
        wide = max(tile.block_k, 64)
        blocks = {
            "C": wide, "K": tile.block_k if tile.block_k < 64 else wide, "PRECISION": precision,
            "BLOCK_M": tile.block_m, "BLOCK_K": tile.block_k, "BLOCK_C": tile.block_c, "STAGES": tile.stages,
        }  # fmt: skip
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        name = f"{tile.block_m}x{tile.block_k}x{tile.block_c} w{tile.warps} s{tile.stages}"
        pointers = {"x_ptr": data, "w_ptr": data, "b_ptr": "*fp32", "out_ptr": data}
        sizes = dict.fromkeys(("pixels", "in_h", "in_w", "out_h", "out_w", "c_blocks"), count) | {"alpha": "fp32"}
        for kind, taps, stride, backward in (
            ("forward", 3, 1, False), ("forward stride 2", 3, 2, False), ("input gradient", 3, 1, True),
            ("up input gradient", 4, 2, True),
        ):  # fmt: skip
            signature = pointers | {"y_prev_ptr": data, "db_ptr": "*fp32"} | sizes
            constants = blocks | {
                "KH": taps, "KW": taps, "STRIDE": stride, "PAD": 1, "HAS_BIAS": not backward, "ACTIVATION": "elu",
                "BACKWARD": backward,
            }  # fmt: skip
            if backward:
                constants["b_ptr"] = None
            else:
                constants |= {"y_prev_ptr": None, "db_ptr": None}
            yield f"conv {kind} {dtype} {name}", implicit_gemm._conv_kernel, signature, constants, options
        for skip in (0, 8):
            signature = pointers | {"skip_ptr": data} | dict.fromkeys(("pixels", "height", "width", "c_blocks"), count)
            signature["alpha"] = "fp32"
            constants = blocks | {"HAS_BIAS": True, "SKIP_SIZE": skip, "ACTIVATION": "elu"}
            constants |= {} if skip else {"skip_ptr": None}
            kind = "with skip" if skip else "forward"
            yield f"upconv {kind} {dtype} {name}", implicit_gemm._upconv_kernel, signature, constants, options


def _elementwise_cases(dtype: str) -> Iterator[Case]:
    data = f"*{dtype}"
    yield (
        f"activation backward {dtype}", elementwise._activation_backward_kernel,
        {"grad_ptr": data, "y_ptr": data, "out_ptr": data, "db_ptr": "*fp32", "rows": "i32", "alpha": "fp32"},
        {"K": 128, "ACTIVATION": "elu", "BLOCK_M": 32, "BLOCK_K": 128}, {},
    )  # fmt: skip
    for eta in (1, 2):
        pair = {"prediction_ptr": data, "target_ptr": data}
        yield (
            f"l1 forward eta {eta} {dtype}", elementwise._l1_forward_kernel,
            pair | {"partial_ptr": "*fp32", "values": "i32"}, {"ETA": eta, "BLOCK": 1024}, {},
        )  # fmt: skip
        yield (
            f"l1 backward eta {eta} {dtype}", elementwise._l1_backward_kernel,
            pair | {"grad_ptr": "*fp32", "d_prediction_ptr": data, "d_target_ptr": data, "values": "i32"},
            {"ETA": eta, "TO_TARGET": True, "BLOCK": 1024}, {},
        )  # fmt: skip
    yield (
        f"normalize images {dtype}", elementwise._normalize_images_kernel,
        {"images_ptr": "*u8", "index_ptr": "*i64", "flip_ptr": "*u8", "out_ptr": data, "height": "i32", "width": "i32"},
        {"C": 3, "HAS_INDEX": True, "HAS_FLIP": True, "BLOCK": 1024}, {},
    )  # fmt: skip


def cases(capability: int) -> Iterator[Case]:
    """What ships for an architecture: elementwise kernels everywhere, matrix products from Ampere on."""
    yield (
        "equilibrium update", elementwise._equilibrium_update_kernel,
        {
            "real_ptr": "*fp32", "fake_ptr": "*fp32", "skip_ptr": "*u8", "k_ptr": "*fp32", "sums_ptr": "*fp32",
            "window_ptr": "*fp64", "samples": "i32", "gamma": "fp32", "lambda_k": "fp32",
        },
        {"HAS_SKIP": True, "BLOCK": 256}, {},
    )  # fmt: skip
    for dtype in ("fp32",) if capability < 80 else ("fp32", "bf16"):
        yield from _elementwise_cases(dtype)
    if capability >= 80:
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            yield from _matrix_cases(name, shipped_tiles(dtype, capability))


def measure(case: Case, capability: int) -> dict[str, Any]:
    """Registers, stack and shared memory in bytes, and instruction counts of one compiled kernel."""
    name, kernel, given, constants, options = case
    signature = {n: "constexpr" if n in constants else given[n] for n in kernel.arg_names}
    pointers = {(i,): [["tt.divisibility", 16]] for i, n in enumerate(signature) if signature[n].startswith("*")}
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
    return {
        "kernel": name, "sm": capability, "registers": int(found[1]), "stack": int(found[2]),
        "shared": compiled.metadata.shared, **counts,
    }  # fmt: skip


if __name__ == "__main__":
    print(json.dumps([measure(case, int(sm)) for sm in sys.argv[1:] for case in cases(int(sm))]))
