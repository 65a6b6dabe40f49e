"""Which tensors an operation takes together: those of one card, and numbers of the host's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from torch import Tensor

from .findings import FINDINGS, MIXED
from .memory import card_of

INDEXED = frozenset(("index", "index_put", "index_put_", "_index_put_impl_", "_unsafe_index"))
_ANY = frozenset(("copy_", "_to_copy", "_copy_from", "set_", "fill_", "fill"))


def require_one_card(name: str, args: Any, tensors: Sequence[Tensor], cards: Sequence[int | None]) -> None:
    """Raises as torch does where tensors of several devices meet. At least one of them is on a card."""
    if name in _ANY:
        return None
    if name in INDEXED:
        return _require_indexed(name, args)
    if name.startswith("_foreach"):  # each position for itself
        rows = [one for one in args if isinstance(one, (list, tuple)) and one and isinstance(one[0], Tensor)]
        for row in zip(*rows, strict=True):
            _require(name, row, [card_of(tensor) for tensor in row])
        return None
    return _require(name, tensors, cards)


def _require(name: str, tensors: Sequence[Tensor], cards: Sequence[int | None]) -> None:
    found = {card for card, tensor in zip(cards, tensors, strict=True) if card is not None or tensor.dim()}
    if len(found) > 1:
        words = " and ".join(sorted("cpu" if card is None else f"cuda:{card}" for card in found))
        _refuse(name, f"Expected all tensors to be on the same device, but found at least two devices, {words}!")


def _require_indexed(name: str, args: Any) -> None:
    card = card_of(args[0])
    others = {card_of(index) for index in args[1] if index is not None} - {None, card}
    if others:
        where = "cpu" if card is None else f"cuda:{card}"
        _refuse(name, f"indices should be either on cpu or on the same device as the indexed tensor ({where})")
    if len(args) > 2:
        _require(name, args[:3:2], [card, card_of(args[2])])


def _refuse(name: str, words: str) -> NoReturn:
    FINDINGS.note(MIXED, f"{name}: {words}")
    raise RuntimeError(f"{words} ({name})")
