"""From an instruction to the function that executes it; None where control flow is left to the machine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from . import access, arithmetic, matrix, mbarrier, mixed, moves, tensor_copies, wgmma
from .operands import Builder, Step
from .syntax import Instruction

if TYPE_CHECKING:
    from .machine import Program

_BUILDERS: dict[str, Builder] = {
    **arithmetic.BUILDERS,
    **moves.BUILDERS,
    "ld": access.load,
    "st": access.store,
    "ldmatrix": matrix.load_matrix,
    "stmatrix": matrix.store_matrix,
    "mma": matrix.multiply,
    "mbarrier": mbarrier.build,
    "fence": mbarrier.fence,
    "wgmma": wgmma.build,
}


def decode(program: Program, i: Instruction) -> Step | None:
    """What executes the instruction. Raises NotImplementedError for one that the machine does not know."""
    name = i.op[0]
    if name in ("bra", "ret", "exit", "barrier") or i.op[:2] in (("bar", "sync"), ("mbarrier", "try_wait")):
        return None
    if i.op[:2] == ("bar", "warp"):
        return lambda m, mask: m.warp_barrier(mask)
    if i.op[:2] == ("cp", "async"):
        return (tensor_copies.build if i.op[2] == "bulk" else access.copy_async)(program, i)
    if mixed.is_mixed(i):
        return mixed.build(program, i)
    if name not in _BUILDERS:
        raise NotImplementedError(i.text)
    return _BUILDERS[name](program, i)
