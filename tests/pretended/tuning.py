"""Choosing kernels without children and without a stopwatch, which the interpreter has no time for.

PRETENDED_TUNING names the form that is the fastest, by how its name begins: "library", "pointer" or "tma"; "plain":
no kernel may be used; "child": real children, without a stopwatch. With PRETENDED_TRUST all forms are right, unseen.
All that depends on the names in `fastbegan_kernels.tuning` is in here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any


def patch(tuning: ModuleType) -> None:
    """Replace the trial of forms, or only its stopwatch."""
    wanted = os.environ["PRETENDED_TUNING"]
    from fastbegan_kernels import clock

    module: Any = tuning

    def timings(forms: Sequence[Any]) -> dict[Any, Any]:
        seconds = [0.1 if form.name.startswith(wanted) else 1.0 for form in forms]
        return {form: clock.Timing(seconds[number] + 0.01 * number, 0.0) for number, form in enumerate(forms)}

    def measure(runs: dict[Any, Callable[[int], object]], device: object, rounds: int = 7) -> dict[Any, Any]:
        return timings(list(runs))

    def outcomes(problem: object, device: object, forms: Sequence[Any], *, again: bool = False) -> list[Any]:
        if wanted == "plain":
            return []
        return [module.Outcome(form, None, timing) for form, timing in timings(forms).items()]

    clock.measure = measure  # pyright: ignore[reportAttributeAccessIssue]
    if wanted == "child":
        return
    if wanted == "plain" or os.environ.get("PRETENDED_TRUST"):
        module.outcomes = outcomes
    else:
        os.environ.setdefault("FASTBEGAN_TRIAL", "inside")
