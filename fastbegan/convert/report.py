"""What became of each layer of an accelerated model."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field

UNSEEN = "no call that was followed has reached it yet"
PAIRS = {
    "up": "nearest x2 to convolution",
    "activation": "convolution to activation",
    "norm": "GroupNorm to SiLU",
}


@dataclass
class Report:
    """What `accelerate` did with each layer of a model. `print` shows it as a table.

    It is filled by each call that is followed: at once with `example` or `check`, else by the first call.
    """

    replaced: dict[str, str] = field(default_factory=dict)
    """By path: the operations that are one call now."""
    left: dict[str, str] = field(default_factory=dict)
    """By path: why the layer runs as before."""
    pairs: dict[str, dict[str, bool]] = field(default_factory=lambda: {kind: {} for kind in PAIRS})
    """By kind (a key of PAIRS) and place: whether the pair of operations that was met there is taken."""
    breaks: dict[str, int] = field(default_factory=dict)
    """Why a forward was followed in parts, or not at all, and how often."""
    checked: str = "not checked"
    """The largest errors that `check` found."""
    restored: bool = field(default=False, repr=False)
    """Whether `restore` was called."""

    def take(self, place: str, words: str) -> None:
        """Note that a layer is on the fast layers in at least one followed call."""
        self.replaced[place] = words
        self.left.pop(place, None)

    def leave(self, place: str, why: str) -> None:
        """Note why a layer runs as before, unless another call takes it."""
        if place not in self.replaced:
            self.left[place] = why

    def meet(self, kind: str, places: Iterable[str], taken: bool) -> None:
        """Note pairs of operations of one kind."""
        met = self.pairs[kind]
        for place in places:
            met[place] = met.get(place, False) or taken

    @property
    def pending(self) -> bool:
        """Whether no call was followed yet."""
        return not self.replaced and all(why == UNSEEN for why in self.left.values())

    def __str__(self) -> str:
        width = max(map(len, self.replaced), default=0)
        lines = [f"fast  {place:{width}}  {what}" for place, what in self.replaced.items()]
        reasons: dict[str, list[str]] = {}
        for place, why in self.left.items():
            reasons.setdefault(why, []).append(place)
        lines += [f"left  {_some(places)}: {why}" for why, places in reasons.items()]
        lines += [f"note  followed in parts: {why}" for why in self.breaks]
        counts = [f"{sum(met.values())} of {len(met)} {PAIRS[kind]}" for kind, met in self.pairs.items() if met]
        if self.pending:
            counts = ["not called yet: the first call fills this report"]
        return "\n".join([*lines, f"{', '.join(counts) or 'nothing to take'}; {self.checked}"])


def _some(places: list[str]) -> str:
    more = f" and {len(places) - 3} more" if len(places) > 4 else ""
    return ", ".join(places[:3] if more else places) + more
