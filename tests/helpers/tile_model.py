"""A model of the matrix-product kernels: what share of a chip's tensor peak their main loops allow.

`python tests/helpers/tile_model.py CAPABILITY LABEL DTYPE M,K,C,WARPS,STAGES ...` (without TRITON_INTERPRET, in the
project's root) prints a line for each tile, shipped or not. LABEL is a product as in `cross_compile`, or "all". A tile
of the descriptor kernels is SAMPLES,HEIGHT,WIDTH,K,C,WARPS,STAGES.

Nothing here is measured. Each unit of a multiprocessor has its work of one step of the loop. `waiting` plays the loop
on a quarter of a multiprocessor: issue, stalls as the assembler set them, barriers and latencies. The share is the
tensor units' time over the longest of these. Epilogues, empty tiles, DRAM, clocks and conflicts of banks are left out.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple

from tests.helpers.machine_loop import (
    Counts,
    Instruction,
    Tile,
    count,
    group_bytes,
    instructions,
    main_loop,
    multiply_adds,
    steps_in,
    tile_of,
)


class Chip(NamedTuple):
    """All constants of the model, of one multiprocessor (SM) where nothing else is said, and where they come from."""

    name: str
    # NVIDIA's white papers of A100 and H100: 312 dense TFLOPS at 1.41 GHz with 108 SMs, 989 at 1.83 GHz with 132.
    # An HMMA.16816 so takes a quarter 8 cycles, 4 on H100, which HMMA may not reach there. tf32 has half the rate
    tensor: int  # multiply-adds of 16-bit values a cycle
    # CUDA C++ Programming Guide, throughput of arithmetic instructions, by compute capability
    fp32: int  # lanes of FFMA
    integer: int = 64  # lanes of adds, compares and logic, and as many of multiply-adds
    convert: int = 16  # lanes of conversions and special functions
    issue: int = 4  # instructions a cycle: one each quarter
    bank_bytes: int = 128  # of shared memory a cycle
    # ASSUMED: five sixths of the 5120 bytes a cycle that L2 is said to give all SMs (white papers; 47 and 39 each)
    l2: float = 40.0  # bytes a cycle, when all SMs read
    # ASSUMED: half as much again as microbenchmarks find without load (about 200 to 270)
    copy_latency: int = 400  # cycles of a hit in L2
    # ASSUMED, near what microbenchmarks of sm_80 find (arXiv 2206.02874, 2208.11174); no chip has its own here
    matrix_load_latency: int = 33  # LDSM
    shared_latency: int = 28  # LDS
    convert_latency: int = 24
    uniform_latency: int = 12
    barrier: int = 20  # from the last warp's arrival until all go on
    group_latency: int = 30  # after the last cycle of an HGMMA


class Limits(NamedTuple):
    """What an SM has for its programs (CUDA C++ Programming Guide, technical specifications by capability)."""

    shared: int
    registers: int = 65536
    register_unit: int = 256  # a warp's registers are given out in these
    warps: int = 64
    programs: int = 32
    reserved: int = 1024  # shared memory that the system takes of each program


CHIPS = {80: Chip("A100", 1024, 64), 90: Chip("H100", 2048, 128, l2=32.0, copy_latency=450)}
LIMITS = {sm: Limits(228 << 10) for sm in (90, 100, 103)} | {
    80: Limits(164 << 10),
    120: Limits(100 << 10, warps=48, programs=24),
}
_ROUNDS, _UNSTEADY = 20, 8  # rounds of the loop that are played, and those of them before it is taken to be steady


def programs(registers: int, shared: int, warps: int, capability: int) -> int:
    """Programs that an SM holds at once; 0 where one does not fit."""
    limits = LIMITS[capability]
    of_warp = -(-registers * 32 // limits.register_unit) * limits.register_unit
    fitting = limits.registers // (of_warp * warps), limits.shared // (shared + limits.reserved)
    return min(*fitting, limits.warps // warps, limits.programs)


def busy(counts: Counts, tile: Tile, chip: Chip) -> dict[str, float]:
    """Cycles of each unit for one program and step. FFMA has the multiplier to itself and IMAD."""
    warp = 32 * tile.warps
    imad = counts.imad * warp / chip.integer
    if tile.dtype == "fp32":
        products = {"multiply-adds": tile.multiply_adds / chip.fp32 + imad}
    else:
        products = {"tensor": tile.multiply_adds / tensor_rate(tile, chip), "IMAD": imad}
    return products | {
        "issue": counts.instructions * tile.warps / chip.issue,
        "integer": counts.alu * warp / chip.integer + counts.converts * warp / chip.convert,
        "shared memory": counts.shared / chip.bank_bytes,
        "L2": tile.loaded / chip.l2,
    }


def tensor_rate(tile: Tile, chip: Chip) -> float:
    """Multiply-adds a cycle of the unit that computes the products."""
    return {"fp32": chip.fp32, "tf32": chip.tensor / 2}.get(tile.dtype, chip.tensor)


def share(counts: Counts, cycles: float, tile: Tile, chip: Chip) -> tuple[float, str]:
    """The modelled share of the peak of the products' unit, and what limits it; `cycles` from `waiting`.

    The limit is L2, or the unit that is busy for 85 % of the time; where none is, it is waiting.
    """
    times = busy(counts, tile, chip)
    longest = max(cycles, *times.values())
    inside = [name for name in times if name != "L2"]  # what `waiting` plays
    unit = "L2" if times["L2"] == longest else max(inside, key=lambda name: times[name])
    limit = unit if times[unit] >= 0.85 * longest else "waiting"
    return tile.multiply_adds / tensor_rate(tile, chip) / longest, limit


class _Work(NamedTuple):
    """What an instruction asks of a quarter of an SM."""

    unit: str
    cycles: float
    stall: int
    waits: tuple[int, ...]
    sets: int  # a scoreboard, or none: -1
    latency: float
    event: str  # of _EVENTS, or "group": the last HGMMA of those that are waited for together
    left: int  # of what is waited for, the number that may still be under way


_EVENTS = (  # (beginning of the name, event); plurals are waited for
    ("BAR.SYNC", "barrier"),
    ("LDGSTS", "copy"),
    ("LDGDEPBAR", "commit"),
    ("DEPBAR.LE", "copies"),
    ("SYNCS.PHASECHK", "loads"),
    ("WARPGROUP.DEPBAR", "groups"),
)


def _work(part: Instruction, tile: Tile, chip: Chip) -> _Work:
    """A quarter has a fourth of each unit, and of shared memory every fourth cycle."""
    memory = 4 * part.moved / chip.bank_bytes
    unit, cycles, latency = {
        "alu": ("integer", 4 * 32 / chip.integer, 0),
        "imad": ("multiplier", 4 * 32 / chip.integer, 0),
        "uniform": ("", 0.0, chip.uniform_latency),
        "convert": ("integer", 4 * 32 / chip.convert, chip.convert_latency),
        "matrix load": ("memory", memory, chip.matrix_load_latency),
        "shared": ("memory", memory, chip.shared_latency),
        "copy": ("memory", memory, 0),
        "global": ("", 0.0, chip.copy_latency),
    }.get(part.kind, ("", 0.0, 0))
    event = next((event for begin, event in _EVENTS if part.name.startswith(begin)), "")
    if part.kind == "product":
        unit = "multiplier" if part.name.startswith("FFMA") else "tensor"
        cycles = 4 * multiply_adds(part) / tensor_rate(tile, chip)
        if part.name.startswith("HGMMA"):
            cycles = max(cycles / 4, group_bytes(part, tile.size) / chip.bank_bytes)
            event = "group" if "gsb0" in part.operands else ""
    kept = re.search(r"(?:SB0|gsb0), 0x(\w+)", part.operands)
    sets = part.sets if part.sets < 6 and latency else -1
    return _Work(unit, cycles, part.stall, part.waits, sets, latency, event, int(kept[1], 16) if kept else 0)


@dataclass
class _Warp:
    """A warp on its way through the loop, and when what it has begun will be there."""

    program: int
    ready: float
    copies: list[float]  # groups of asynchronous copies
    loads: list[float]  # descriptors' loads, one entry a step
    at: int = 0
    seen: int = 0  # loads waited for
    open_copies: float = 0.0
    boards: list[float] = field(default_factory=lambda: [0.0] * 6)
    groups: list[float] = field(default_factory=list)  # products of a group of warps

    def may_issue(self, work: _Work) -> float:
        """When nothing of the warp's own holds the instruction back."""
        times = [self.ready, *(self.boards[number] for number in work.waits)]
        if work.event in ("copies", "groups"):
            begun = self.copies if work.event == "copies" else self.groups
            times += begun[: len(begun) - work.left][-1:]
        elif work.event == "loads":
            times.append(self.loads[self.seen])
        return max(times)

    def issue(self, work: _Work, time: float, done: float, chip: Chip) -> None:
        """Note what the instruction begins; `done` is when its unit is free again."""
        self.ready = time + max(1, work.stall)
        if work.sets >= 0:
            self.boards[work.sets] = done - work.cycles + work.latency
        if work.event == "copy":
            self.open_copies = time + chip.copy_latency
        elif work.event == "commit":
            self.copies.append(max(self.open_copies, *self.copies[-1:]))
        elif work.event == "group":
            self.groups.append(done + chip.group_latency)
        elif work.event == "loads":  # the buffer that this step leaves is filled for a later one
            self.seen += 1
            self.loads.append(time + chip.copy_latency)


def waiting(loop: Sequence[Instruction], tile: Tile, chip: Chip, resident: int) -> float:
    """Cycles of a step and program, when `resident` programs share an SM whose L2 is endlessly fast.

    Their warps on a quarter issue in order, one instruction a cycle among them: the earliest, of equals the first. (To
    let the longest waiting go first moved shares by up to 0.11.) No warp ends before the others, and rounds are
    counted over all: the last rounds of one would otherwise have the units to themselves.
    """
    works = [_work(part, tile, chip) for part in loop]
    of_program = max(1, tile.warps // 4)
    first = float(chip.copy_latency)
    warps = [
        _Warp(number // of_program, 97.0 * (number // of_program), [first] * (tile.stages + 1), [first] * tile.stages)
        for number in range(resident * of_program)
    ]
    free: dict[str, float] = {}
    port, begin = 0.0, 0.0
    arrived: dict[int, list[int]] = {}
    times = [warp.may_issue(works[0]) for warp in warps]
    round_of_all = len(works) * len(warps)
    for issued in range(_ROUNDS * round_of_all):
        port, number = min((max(times[i], port, free.get(works[warp.at].unit, 0.0)), i) for i, warp in enumerate(warps))
        warp, work = warps[number], works[warps[number].at]
        if issued == _UNSTEADY * round_of_all:
            begin = port
        done = port + work.cycles
        if work.unit:
            free[work.unit] = done
        warp.issue(work, port, done, chip)
        warp.at = (warp.at + 1) % len(works)
        times[number] = warp.may_issue(works[warp.at])
        if work.event == "barrier":
            there = arrived.setdefault(warp.program, [])
            there.append(number)
            times[number] = math.inf
            if len(there) == of_program:
                for i in arrived.pop(warp.program):
                    warps[i].ready = max(warps[i].ready, port + chip.barrier)
                    times[i] = warps[i].may_issue(works[warps[i].at])
        port += 1
    return (port - begin) / (_ROUNDS - _UNSTEADY) / steps_in(loop, tile) / resident


def loop_figures(machine: str, kernel: str, capability: int, registers: int, shared: int) -> dict[str, Any]:
    """What the record holds of a matrix product besides its totals.

    Programs of an SM, the counts of one step of the loop, and, of the model, the cycles of `waiting`. Only programs,
    where the chip is not modelled (sm_100) or the tile does not fit.
    """
    tile = tile_of(kernel)
    resident = programs(registers, shared, tile.warps, capability)
    loop = main_loop(instructions(machine))
    if not loop or not resident or capability not in CHIPS:
        return {"programs": resident}
    cycles = waiting(loop, tile, CHIPS[capability], resident)
    return {"programs": resident, "loop": asdict(count(loop, tile)), "model_cycles": round(cycles)}


def modelled(row: dict[str, Any], *, endless_l2: bool = False) -> tuple[float, str]:
    """Share and limit of a recorded row."""
    chip = CHIPS[row["sm"]]
    chip = chip._replace(l2=math.inf) if endless_l2 else chip
    return share(Counts(**row["loop"]), row["model_cycles"], tile_of(row["kernel"]), chip)


def _range(values: Iterable[float], form: str = "d") -> str:
    texts = list(dict.fromkeys(format(value, form) for value in sorted(values)))
    return texts[0] if len(texts) == 1 else f"{texts[0]}-{texts[-1]}"


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The bf16 tiles in Markdown, each with the range over its products. Rows without a loop are left out."""
    groups: dict[tuple[int, str], list[dict[str, Any]]] = {}
    for row in rows:
        _, _, tile = row["kernel"].partition(" bf16 ")
        if "loop" in row and tile and not tile.endswith(" flat"):  # a flat grid has the same loop
            groups.setdefault((row["sm"], tile), []).append(row)
    if not groups:
        return "model: not recorded yet\n"
    lines = [
        "model, not measured: the range over all products of a tile, in bf16",
        "",
        "| chip, tile | registers | programs an SM | instructions a step | integer ones a product | bytes a FLOP | share of peak, model | limited by | were L2 endless |",  # noqa: E501
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | --- | ---: |",
    ]
    for (sm, name), group in groups.items():
        counts = [Counts(**row["loop"]) for row in group]
        tile = tile_of(group[0]["kernel"])
        shares, limits = zip(*map(modelled, group), strict=True)
        cells = (
            f"{CHIPS[sm].name}, {name}",
            _range(row["registers"] for row in group),
            _range(row["programs"] for row in group),
            _range((one.instructions for one in counts), ".0f"),
            _range((one.integers for one in counts), ".1f"),
            f"{tile.loaded / (2 * tile.multiply_adds):.4f}",
            _range(shares, ".2f"),
            ", ".join(dict.fromkeys(limits)),
            _range((modelled(row, endless_l2=True)[0] for row in group), ".2f"),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def line(row: dict[str, Any]) -> str:
    """All figures of a measured kernel."""
    head = f"{row['kernel']} sm_{row['sm']}: {row['registers']} registers, stack {row['stack']}, "
    head += f"{row['shared'] / 1024:.0f} KiB, {row['programs']} programs"
    if "loop" not in row:
        return f"{head}; not modelled"
    counts, tile = Counts(**row["loop"]), tile_of(row["kernel"])
    times = busy(counts, tile, CHIPS[row["sm"]]) | {"waiting": row["model_cycles"]}
    part, limit = modelled(row)
    return "; ".join(
        (
            head,
            f"a step: {counts.instructions:g} instructions, {counts.products:g} products, {counts.alu:g} ALU, "
            f"{counts.imad:g} IMAD, {counts.uniform:g} uniform ({counts.integers:.1f} a product), "
            f"{counts.barriers:g} barriers, {tile.loaded} bytes ({tile.loaded / (2 * tile.multiply_adds):.4f} a FLOP), "
            f"{2 * tile.multiply_adds} FLOP",
            f"modelled cycles: {', '.join(f'{name} {time:.0f}' for name, time in times.items())}",
            f"modelled share {part:.2f}, {limit} ({modelled(row, endless_l2=True)[0]:.2f} were L2 endless)",
        )
    )


def main() -> None:
    """See the top of the file."""
    from fastbegan_kernels.fused.conv_tiles import Tile as PointerTile
    from fastbegan_kernels.fused.conv_tiles import TmaTile
    from tests.helpers import cross_compile

    capability, label, dtype, *texts = sys.argv[1:]
    for text in texts:
        sizes = [int(number) for number in text.split(",")]
        kind: Any = TmaTile if len(sizes) == 7 else PointerTile
        tile = kind(*sizes)
        for case in cross_compile._matrix_cases(dtype, [tile]):
            if label == "all" or case[0].startswith(f"{label} {dtype} "):
                print(line(cross_compile.measure(case, int(capability))), flush=True)


if __name__ == "__main__":
    main()
