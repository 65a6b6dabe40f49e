"""A stamp says in one number who touched memory when: a CTA's epoch, a warp's epoch, and the thread.

A barrier of a CTA begins its next epoch, a barrier of a warp the warp's next. Stamps of one CTA grow with its epochs.
"""

from __future__ import annotations

from typing import Any

EPOCH, WARP_EPOCH = 1 << 36, 1 << 24
NEVER, FLIGHT = 1 << 62, 1 << 61
"""Marks in place of a stamp, or added to one: never written; an asynchronous copy is on its way."""
NONE = -(1 << 62)
"""Older than every stamp."""


def lane_of(stamp: Any) -> Any:
    """The thread, counted through all CTAs that run at once."""
    return stamp & (WARP_EPOCH - 1)


def warp_of(stamp: Any) -> Any:
    """The warp, counted likewise."""
    return lane_of(stamp) // 32


def epoch_of(stamp: Any) -> Any:
    """The first stamp of this epoch of the CTA."""
    return stamp - stamp % EPOCH


def warp_epoch_of(stamp: Any) -> Any:
    """The first stamp of this epoch of the warp."""
    return stamp - stamp % WARP_EPOCH
