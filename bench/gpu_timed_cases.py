"""What is timed: only what the checks before never saw wrong, and what matters most first."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

from bench.gpu_candidates import STAGES, kinds_of
from bench.gpu_cases import CHANNELS, DRY, DTYPES, MODES, Case, Outcome, case_of, tile_names, tile_of, worth_trying
from fastbegan_kernels.fused.tiles import TmaTile
from fastbegan_kernels.tiers import KINDS

MODE = MODES[0]
MAPS = (8,) if DRY else (64, 32, 128, 16, 8)  # sides of the larger map of a layer
BATCHES = (1,) if DRY else (16, 64)
HUGE = 256 * 2**20  # bytes
SLOW = "max-autotune-no-cudagraphs"  # no CUDA graphs of its own: replays are captured for every candidate alike


def input_side(op: str, size: int) -> int:
    """Of an op whose larger map has this side."""
    return size // 2 if op in ("up", "decoder") else size


def map_side(case: Case) -> int:
    """The side of the larger map."""
    return case.shape[2] * (2 if case.op in ("up", "decoder") else 1)


def never_wrong(outcomes: list[Outcome], op: str, mode: str, tile: str = "") -> bool:
    """Seen right, and never anything but right."""
    seen = {
        outcome["status"]
        for outcome in outcomes
        if (outcome["case"]["op"], outcome["case"]["mode"], outcome["case"]["tile"]) == (op, mode, tile)
    }
    return seen - {"skipped"} == {"right"}


def right_tiles(outcomes: list[Outcome], op: str, capability: int) -> tuple[str, ...]:
    """Tiles that may be timed: right in every layer of the op."""
    if not never_wrong(outcomes, "activation_backward", MODE):  # every backward begins with it
        return ()
    names = tile_names(MODE, capability)
    return tuple(name for name in names if all(never_wrong(outcomes, kind, MODE, name) for kind in kinds_of(op)))


def layer_cases(outcomes: list[Outcome], capability: int) -> list[Case]:
    """The layers at the shapes of the networks."""
    right = {kind: right_tiles(outcomes, kind, capability) for kind in KINDS}
    cases: list[Case] = []
    for batch, n, size, kind in itertools.product(BATCHES, CHANNELS, MAPS, ("up", "same", "down")):
        side = input_side(kind, size)
        base = Case("time", kind, MODE, (batch, n, side, side, n), needs=0 if DRY else 5)
        first = size == MAPS[0] and batch == BATCHES[0]
        cases.append(replace(base, tiles=_tiles(base, right[kind], first, capability)))
    return cases


def _tiles(case: Case, right: tuple[str, ...], every: bool, capability: int) -> tuple[str, ...]:
    """All that can be used, or those among which the package would choose."""
    if DRY:
        return right
    if not every:
        return tuple(name for name in right if name in worth_trying(case, capability))
    found = {name: tile_of(name) for name in right}
    return tuple(name for name, tile in found.items() if not isinstance(tile, TmaTile) or case.product.fits(tile))


def stage_cases(outcomes: list[Outcome], capability: int) -> list[Case]:
    """A level of the decoder, and one of the encoder; all right tiles, of which each layer takes what suits it."""
    cases: list[Case] = []
    for n, size, op in itertools.product(CHANNELS, (8,) if DRY else (64, 128, 32), STAGES):
        side = input_side(op, size)
        shape = (BATCHES[0], n, side, side, n)
        cases.append(Case("time", op, MODE, shape, tiles=right_tiles(outcomes, op, capability), needs=0 if DRY else 6))
    return cases


def small_cases(outcomes: list[Outcome]) -> list[Case]:
    """The loss at 256 MiB a tensor and at training shapes, the weights of a net, batches and the controller."""
    cases: list[Case] = []
    for op, mode, extra in itertools.product(("one_pass", "l1_reconstruction_loss"), (MODE, "fp32"), (False, True)):
        samples = math.ceil(HUGE / (3 * 128 * 128 * DTYPES[mode].itemsize))
        huge = Case("time", op, mode, (samples, 3, 128, 128, 3), extra=extra, compilers=("default",), needs=8)
        training = replace(huge, compilers=(), needs=2)
        cases += [huge, *(replace(training, shape=(n, 3, side, side, 3)) for n, side in ((16, 64), (64, 128)))]
    cases += [Case("time", "fold", MODE, (1, CHANNELS[0], 3, 3, CHANNELS[0]), compilers=("default",), needs=20)]
    cases += [Case("time", "normalize_images", MODE, (batch, 3, 128, 128, 3)) for batch in (16, 64)]
    cases += [Case("time", "equilibrium_update", "fp32", (64,) * 5)]
    if DRY:
        cases = list({(case.op, case.extra): replace(case, shape=(2, 3, 4, 4, 3), needs=0) for case in cases}.values())
    checked = {"one_pass": "l1_reconstruction_loss"}
    return [case for case in cases if never_wrong(outcomes, checked.get(case.op, case.op), case.mode)]


def best(measured: dict[str, Outcome], *prefixes: str) -> tuple[str, float] | None:
    """Name and milliseconds of the fastest candidate whose name begins so."""
    found = [(known["ms"], name) for name, known in measured.items() if name.startswith(prefixes) and "ms" in known]
    return (min(found)[1], min(found)[0]) if found else None


def compile_cases(timed: list[Outcome]) -> list[Case]:
    """The same shapes with torch.compile, beside the best tile only; the slow search for one shape of each op."""
    quick: list[Case] = []
    for outcome in timed:
        if outcome["status"] != "timed":
            continue
        case = case_of(outcome["case"])
        fastest = best(outcome["both"], "fused") or best(outcome["forward"], "fused")
        beside = tuple(name for name in case.tiles if fastest and name.startswith(fastest[0].removeprefix("fused ")))
        quick.append(replace(case, tiles=beside, compilers=("default",), needs=0 if DRY else 12))
    firsts = list({case.op: case for case in reversed(quick)}.values())
    firsts.sort(key=quick.index)
    slow = [replace(case, compilers=(SLOW,), needs=0 if DRY else 50) for case in firsts if case.op in KINDS]
    rest = [case for case in quick if case not in firsts]
    return firsts[:1] + slow[:1] if DRY else firsts + slow + rest
