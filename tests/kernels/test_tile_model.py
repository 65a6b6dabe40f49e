"""The model of the main loops: what it counts in machine code, and that its times keep to the rates it states."""

from __future__ import annotations

import json
import math

import pytest

from tests.helpers import machine_loop, tile_model
from tests.helpers.machine_loop import Counts, Instruction, Tile
from tests.kernels.test_cross_compile import _compiled

A100, H100 = tile_model.CHIPS[80], tile_model.CHIPS[90]
TILE = machine_loop.tile_of("conv forward bf16 pointer 64x64x64 w4 s3")
# an outer loop from 0x10, an inner one from 0x20 to 0x90, and a loop without products from 0xb0
CODE = """
        /*0000*/                   MOV R1, c[0x0][0x28] ;                          /* 0x00000a0000017a02 */
                                                                                   /* 0x000fe40000000f00 */
        /*0010*/                   IADD3 R2, R2, 0x1, RZ ;                         /* 0x0000000000007919 */
                                                                                   /* 0x000e620000002100 */
        /*0020*/                   LDSM.16.M88.4 R36, [R74] ;                      /* 0x000000004a24783b */
                                                                                   /* 0x000e280000000200 */
        /*0030*/                   HMMA.16816.F32.BF16 R4, R36.reuse, R2, R4 ;     /* 0x000000022404723c */
                                                                                   /* 0x041fe20000041804 */
        /*0040*/                   HMMA.16816.F32.BF16 R8, R36, R40, R8 ;          /* 0x000000282408723c */
                                                                                   /* 0x000fe20000041808 */
        /*0050*/                   IMAD R10, R10, c[0x0][0x18c], RZ ;              /* 0x000063000a0a7a24 */
                                                                                   /* 0x000fe200078e02ff */
        /*0060*/              @!PT LDS RZ, [RZ] ;                                  /* 0x00000000fffff984 */
                                                                                   /* 0x000fe20000000800 */
        /*0070*/                   LDGSTS.E.BYPASS.LTC128B.128 [R2], [R8.64], P0 ; /* 0x0000000008027fae */
                                                                                   /* 0x0003e2000c121c46 */
        /*0080*/                   BAR.SYNC.DEFER_BLOCKING 0x0 ;                   /* 0x0000000000007b1d */
                                                                                   /* 0x000fec0000010000 */
        /*0090*/               @P0 BRA 0x20 ;                                      /* 0xfffff00000000947 */
                                                                                   /* 0x000fea000383ffff */
        /*00a0*/              @UP0 BRA 0x10 ;                                      /* 0xfffff00000000947 */
                                                                                   /* 0x000fea000383ffff */
        /*00b0*/                   FFMA R4, R4, R5, R6 ;                           /* 0x0000000504047223 */
                                                                                   /* 0x000fe20000000006 */
        /*00c0*/               @P1 BRA 0xb0 ;                                      /* 0xffffffe000001947 */
                                                                                   /* 0x000fea000383ffff */
"""


def test_the_main_loop_is_the_innermost_one_with_products() -> None:
    loop = machine_loop.main_loop(machine_loop.instructions(CODE))
    assert [part.address for part in loop] == list(range(0x20, 0xA0, 0x10))
    assert machine_loop.main_loop([part for part in machine_loop.instructions(CODE) if part.kind != "product"]) == []


def test_the_schedule_is_read() -> None:
    load, product, *_ = machine_loop.main_loop(machine_loop.instructions(CODE))
    assert (load.stall, load.sets, load.waits, load.moved) == (4, 0, (), 512)
    assert (product.stall, product.sets, product.waits) == (1, 7, (0,))


def test_instructions_are_counted_by_class() -> None:
    tile = Tile(pixels=16, outputs=16, inputs=16, warps=1, stages=2, dtype="bf16")
    found = machine_loop.count(machine_loop.main_loop(machine_loop.instructions(CODE)), tile)
    # the load into RZ never executes; 1024 bytes of operands go into shared memory, and one LDSM reads 512
    assert found == Counts(8, products=2, alu=0, imad=1, uniform=0, converts=0, barriers=1, shared=1024 + 512)
    assert found.integers == 0.5


def test_steps_of_an_unrolled_loop_are_told_apart() -> None:
    tile = Tile(pixels=16, outputs=8, inputs=16, warps=1, stages=2, dtype="bf16")
    found = machine_loop.count(machine_loop.main_loop(machine_loop.instructions(CODE)), tile)
    assert (found.products, found.instructions, found.imad) == (1, 4, 0.5)


@pytest.mark.parametrize(
    ("name", "operands", "made", "read"),
    [
        ("HMMA.16816.F32.BF16", "R4, R36, R2, R4", 2048, None),
        ("HMMA.1688.F32.TF32", "R4, R36, R2, R4", 1024, None),
        ("HGMMA.64x128x16.F32.BF16", "R24, gdesc[UR8], R24", 64 * 128 * 16, (64 + 128) * 16 * 2),
        ("HGMMA.64x128x16.F32.BF16", "R24, R4, gdesc[UR8], R24", 64 * 128 * 16, 128 * 16 * 2),
        ("FFMA", "R4, R4, R5, R6", 32, None),
    ],
)
def test_products_of_an_instruction(name: str, operands: str, made: int, read: int | None) -> None:
    part = Instruction(0, name, operands, "product")
    assert machine_loop.multiply_adds(part) == made
    assert read is None or machine_loop.group_bytes(part, 2) == read


@pytest.mark.parametrize(
    ("registers", "shared", "warps", "capability", "expected"),
    [
        (128, 32 << 10, 4, 80, 4),  # registers: 65536 / (128 * 128)
        (129, 32 << 10, 4, 80, 3),  # given out in eights
        (251, 32 << 10, 4, 80, 2),
        (197, 64 << 10, 8, 80, 1),
        (40, 48 << 10, 4, 80, 3),  # shared memory: 164 KiB, and one of each program is the system's
        (40, 48 << 10, 4, 90, 4),
        (32, 0, 4, 80, 16),  # warps
        (16, 0, 1, 80, 32),  # programs
        (64, 164 << 10, 4, 80, 0),  # too large
    ],
)
def test_programs_of_a_multiprocessor(registers: int, shared: int, warps: int, capability: int, expected: int) -> None:
    assert tile_model.programs(registers, shared, warps, capability) == expected


def _loop(name: str, count: int, control: int = 7 << 5 | 1, operands: str = "") -> list[Instruction]:
    kind = machine_loop._kind(name, None)
    return [Instruction(16 * i, name, operands, kind, control) for i in range(count)]


def test_products_alone_reach_the_peak() -> None:
    products = _loop("HMMA.16816.F32.BF16", 32)
    assert tile_model.waiting(products, TILE, A100, 2) == pytest.approx(256, rel=0.02)
    assert tile_model.waiting(products, TILE, H100, 2) == pytest.approx(128, rel=0.02)


def test_no_play_is_faster_than_its_units() -> None:
    """Each program's last rounds would be, did the others end before it."""
    loop = [*_loop("HMMA.16816.F32.BF16", 32), *_loop("IADD3", 100), *_loop("LDSM.16.M88.4", 16)]
    times = tile_model.busy(machine_loop.count(loop, TILE), TILE, A100)
    for resident in (1, 2, 4, 8):
        assert tile_model.waiting(loop, TILE, A100, resident) > 0.98 * max(times["tensor"], times["integer"])


def test_latencies_and_barriers_hold_back_one_program_more_than_four() -> None:
    products = _loop("HMMA.16816.F32.BF16", 32)
    load = _loop("LDSM.16.M88.4", 1, control=2 << 5 | 1)
    use = _loop("HMMA.16816.F32.BF16", 1, control=1 << 11 + 2 | 7 << 5 | 1)
    loop = [*products[1:], *load, *use, *_loop("BAR.SYNC.DEFER_BLOCKING", 1)]
    alone, together = (tile_model.waiting(loop, TILE, A100, resident) for resident in (1, 4))
    assert alone == pytest.approx(8 * 30 + 1 + 33 + 1 + 20, abs=3) and together < 265


def test_a_barrier_waits_for_all_warps_of_its_program() -> None:
    load = _loop("LDG.E.128", 1, control=2 << 5 | 1)
    use = _loop("HMMA.16816.F32.BF16", 16, control=1 << 11 + 2 | 7 << 5 | 1)
    loop = [*_loop("BAR.SYNC.DEFER_BLOCKING", 1), *load, *use]
    # two warps a quarter come to it one after the other's 16 products, and both wait for the load after it
    assert tile_model.waiting(loop, TILE._replace(warps=8), A100, 1) == pytest.approx(2 * 16 * 8 + 20 + 400, abs=10)


def test_copies_are_waited_for() -> None:
    def loop(left: int) -> list[Instruction]:
        waits = _loop("DEPBAR.LE", 1, operands=f"SB0, 0x{left}")
        return [*_loop("HMMA.16816.F32.BF16", 32), *_loop("LDGSTS.E.128", 1), *_loop("LDGDEPBAR", 1), *waits]

    at_once, later = (tile_model.waiting(loop(left), TILE, A100, 1) for left in (0, 2))
    assert at_once > 400 and later == pytest.approx(256, rel=0.05)


def test_the_share_is_that_of_the_busiest() -> None:
    counts = Counts(100, products=32, alu=20, imad=10, uniform=0, converts=0, barriers=2, shared=10000)
    assert tile_model.share(counts, 300, TILE, A100._replace(l2=math.inf)) == (256 / 300, "tensor")
    assert tile_model.share(counts, 512, TILE, A100._replace(l2=math.inf)) == (0.5, "waiting")
    assert tile_model.share(counts, 300, TILE, A100._replace(l2=32.0)) == (0.5, "L2")
    assert tile_model.share(counts, 512, TILE, A100._replace(l2=33.0)) == (0.5, "waiting")  # L2 alone would do


def test_the_table_has_the_range_over_products() -> None:
    loop = {"instructions": 206, "products": 32, "alu": 99, "imad": 30, "uniform": 9, "converts": 0, "barriers": 3}
    row = {"sm": 80, "registers": 128, "programs": 4, "loop": loop | {"shared": 49152}, "model_cycles": 300}
    other = row | {"registers": 120, "loop": loop | {"shared": 49152, "alu": 67}}
    tile = "bf16 pointer 64x64x64 w4 s3"
    rows = [row | {"kernel": f"conv forward {tile}"}, other | {"kernel": f"upconv forward {tile}"}]
    shown = tile_model.table([*rows, {"kernel": "fold bf16", "sm": 80}, {"kernel": f"x {tile}", "sm": 100}])
    assert shown.splitlines()[0].startswith("model, not measured")
    assert shown.splitlines()[4:] == [
        "| A100, pointer 64x64x64 w4 s3 | 120-128 | 4 | 206 | 3.3-4.3 | 0.0312 | 0.62 | L2 | 0.67 |"
    ]


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("capability", "kernel", "made"),
    [
        pytest.param(
            80, "upconv forward bf16 pointer 64x32x32 w4 s3", 64 * 32 * 32 // (2048 * 4), marks=pytest.mark.slow
        ),
        pytest.param(
            80, "upconv forward tf32 pointer 64x32x32 w4 s3", 64 * 32 * 32 // (1024 * 4), marks=pytest.mark.slow
        ),
        pytest.param(
            80, "upconv forward fp32 pointer 64x32x32 w4 s3", 64 * 32 * 32 // (32 * 4), marks=pytest.mark.slow
        ),
        pytest.param(90, "upconv forward bf16 tma 1x8x16x64x64 w4 s4", 64 // 16, marks=pytest.mark.slow),
    ],
)
def test_the_loop_of_a_compiled_kernel_has_the_products_of_one_step(capability: int, kernel: str, made: int) -> None:
    row = next(row for row in _compiled(capability, kernel) if row["kernel"] == kernel)
    loop = Counts(**row["loop"])
    assert loop.products == made
    assert loop.barriers >= 1 and loop.products < loop.instructions < 1000 and row["programs"] >= 2
    assert 0 < tile_model.modelled(row)[0] <= 1
    assert kernel.partition("forward ")[2] in tile_model.line(row)
    assert ("pointer 64x32x32" in tile_model.table([row])) == (" bf16 pointer" in kernel)
    assert json.loads(json.dumps(row)) == row
