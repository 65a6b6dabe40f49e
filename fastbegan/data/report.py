"""What became of a source's entries: the rows of NAME.rejected.txt, and the lines that count them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from ..files import atomic, printable
from .decode import Decoding, Note, largest_side
from .folder import LeftOut
from .pack import Line
from .source import Files

BROKEN, LEFT_OUT = "broken", "left out"
_ENLARGED = "enlarged"
_NOTES = {
    Note.CONVERTED: "converted",
    Note.PROFILE: "colours converted",
    Note.PROFILE_IGNORED: "profile ignored",
    Note.FEW_BITS: "dark",
}
_MEANINGS = {
    "converted": "rotated, or of another mode than 8-bit RGB or grey",
    "colours converted": "to sRGB, from the profile in the file",
    "profile ignored": "broken, or of another colour space than the image",
    "dark": "16-bit files that use 12 bits or fewer",
    _ENLARGED: "smaller than the images that were asked for",
}
_KINDS = 6  # kinds of left-out entries that are named
_LOOKED_AT = 32  # images of a pack, and rows and columns of each
_BLACK, _PLAIN = 16, 8  # grey levels below which an image is nearly black, and nearly of one colour


class Row(NamedTuple):
    """An entry that is worth a word."""

    name: str
    kind: str
    detail: str = ""


def left_out(item: LeftOut) -> Row:
    """The row of something that is not taken."""
    return Row(item.name, LEFT_OUT, item.kind)


def rows(source: Files, lines: Iterable[Line], decoding: Decoding, size: int) -> Iterator[Row]:
    """All that is to be said about a source that was decoded to `lines`, for images of `size` pixels."""
    kept = largest_side(decoding.crop)
    for item in source.left_out:
        yield left_out(item)
    for line in lines:
        for name, reason in line.broken:
            yield Row(name, BROKEN, reason)
        for entry, width, height, notes in line.files:
            if notes:
                yield from (Row(source.names[entry], kind) for note, kind in _NOTES.items() if notes & note)
            if min(width, height, kept) < size:
                yield Row(source.names[entry], _ENLARGED, f"from {width}x{height}")


def write(path: Path, lines: Iterable[Row]) -> None:
    """Write rows to a file, a line each, whatever a name holds."""
    with atomic(path) as file:
        for name, kind, detail in lines:
            text = f"{printable(name)}\t{kind}" + (f": {printable(detail)}" if detail else "")
            file.write(f"{text}\n".encode())


def read(path: Path) -> list[Row]:
    """The rows of a file that `write` wrote; none where there is no file."""
    if not path.exists():
        return []
    parts = (line.partition("\t") for line in path.read_text(encoding="utf-8", errors="replace").split("\n") if line)
    return [Row(name, kind, detail) for name, _, rest in parts for kind, _, detail in [rest.partition(": ")]]


def remarks(lines: Iterable[Row]) -> tuple[str, ...]:
    """A line for each kind of row but the broken: how many there are, and one of them."""
    counts: Counter[tuple[str, str]] = Counter()
    examples: dict[tuple[str, str], str] = {}
    for name, kind, detail in lines:
        if kind != BROKEN:
            words = kind, detail if kind == LEFT_OUT else _MEANINGS.get(kind, "")
            counts[words] += 1
            examples.setdefault(words, name)
    most = [words for words, _ in counts.most_common() if words[0] == LEFT_OUT]
    said = [*most[:_KINDS], *(words for words in counts if words[0] != LEFT_OUT)]
    texts = [
        f"{kind} ({printable(what)}): {counts[kind, what]:,}, such as {printable(examples[kind, what])}"
        for kind, what in said
    ]
    if rest := most[_KINDS:]:
        texts.append(f"{LEFT_OUT} ({len(rest)} other kinds): {sum(counts[words] for words in rest):,}")
    return tuple(texts)


def faint(images: np.ndarray) -> list[str]:
    """A line where more than half of a pack is nearly black, or of one colour."""
    if not len(images):
        return []
    chosen = np.linspace(0, len(images) - 1, min(len(images), _LOOKED_AT)).astype(np.int64)
    step = -(-images.shape[1] // _LOOKED_AT)  # a thousand pixels of each are enough
    looked = images[chosen, ::step, ::step].reshape(len(chosen), -1, 3)
    brightest, darkest = looked.max(1), looked.min(1)
    black = (brightest < _BLACK).all(1)
    plain = (brightest - darkest < _PLAIN).all(1) & ~black
    counts = {"nearly black": int(black.sum()), "nearly of one colour": int(plain.sum())}
    return [
        f"{words}: {count} of {len(chosen)} images that were looked at"
        for words, count in counts.items()
        if count > len(chosen) / 2
    ]
