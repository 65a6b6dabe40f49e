"""Makes torch believe in the pretended devices, in this process."""

from __future__ import annotations

from . import findings, tensors, torch_patches, triton_patches
from .dispatch import PretendedMode

_modes: list[PretendedMode] = []


def install() -> None:
    """Patch torch and Triton, and watch this thread and all that come after it. Called once torch is imported."""
    if _modes:
        return
    findings.report_at_exit()
    torch_patches.patch()
    tensors.patch()
    triton_patches.patch()
    torch_patches.patch_threads(PretendedMode)
    _modes.append(PretendedMode())
    _modes[0].__enter__()
