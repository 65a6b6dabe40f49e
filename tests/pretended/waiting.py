"""Operations that make the host wait, though nobody asked for it: they give it a number, or a size."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .captures import capture_on, refuse
from .findings import FINDINGS, PAGEABLE
from .memory import MEMORY, card_of
from .mixing import INDEXED
from .streams import Stream, host_knows, host_waits

_WAITS = frozenset(
    "_local_scalar_dense nonzero equal masked_select _unique2 unique_dim unique_consecutive is_nonzero bincount "
    "_linalg_check_errors _linalg_eigh _linalg_svd".split()
)


def wait_if_needed(
    name: str,
    args: Any,
    kwargs: dict[str, Any],
    tensors: Sequence[Tensor],
    cards: Sequence[int | None],
    stream: Stream,
) -> None:
    """Let the host wait for `stream` where torch does. Raises in a capture."""
    if name in INDEXED:
        _indices(name, args, kwargs, stream)
    elif name in _WAITS or (name == "repeat_interleave" and kwargs.get("output_size") is None):
        for tensor, card in zip(tensors, cards, strict=True):
            if card is not None and (record := MEMORY.of(tensor)) is not None:
                record.use(stream, False)
        host_waits(name, stream.clock)


def _indices(name: str, args: Any, kwargs: dict[str, Any], stream: Stream) -> None:
    indices = [one for one in args[1] if one is not None]
    masks = [one for one in indices if one.dtype in (torch.bool, torch.uint8)]
    if masks and not _is_fill(name, args, kwargs, indices, masks):
        host_waits(f"{name} by a mask", stream.clock)
    if any(card_of(one) is None for one in indices):
        if (graph := capture_on(stream)) is not None:
            refuse(graph, "index from the host's memory")
        FINDINGS.note(PAGEABLE, f"{name} by an index of the host's")
        host_knows(stream.clock)


def _is_fill(name: str, args: Any, kwargs: dict[str, Any], indices: list[Tensor], masks: list[Tensor]) -> bool:
    """Whether torch takes masked_fill instead: one mask, one value."""
    if not name.lstrip("_").startswith("index_put") or len(indices) != 1 or len(masks) != 1:
        return False
    accumulate = kwargs.get("accumulate", args[3] if len(args) > 3 else False)
    return not accumulate and args[2].numel() == 1
