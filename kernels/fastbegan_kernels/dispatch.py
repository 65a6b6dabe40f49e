"""Which implementation of an op runs: the argument, then FASTBEGAN_IMPL, then the best that can run here."""

from __future__ import annotations

import os

IMPLS = ("reference", "algebraic")


def choose(impl: str | None) -> str:
    """Resolve `impl` to one of IMPLS. Raises ValueError for anything else, naming where it came from."""
    source = "impl"
    if impl is None:
        impl, source = os.environ.get("FASTBEGAN_IMPL") or "algebraic", "FASTBEGAN_IMPL"
    if impl not in IMPLS:
        raise ValueError(f"{source} is {impl!r}; accepted: {', '.join(IMPLS)}")
    return impl
