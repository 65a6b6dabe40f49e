"""Places of the encoded pictures in a TFRecord file of tf.train.Example messages, found without TensorFlow."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path

from ..errors import UserError

KEY = b"image/encoded"  # the feature's name in TensorFlow's own data sets
_FRAME = struct.Struct("<QI")  # length and its checksum; four bytes of checksum follow the data


def pictures(path: Path) -> Iterator[tuple[int, int] | list[str] | str]:
    """Yield offset and length of each record's `image/encoded`; else the keys that it has, or how it is damaged.

    Raises UserError where the file does not consist of whole records.
    """
    with path.open("rb") as file:
        if path.stat().st_size == 0:
            return
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            start = number = 0
            while start < len(data):
                try:
                    length, _ = _FRAME.unpack_from(data, start)
                    first = start + _FRAME.size
                    if first + length + 4 > len(data):
                        raise ValueError("it is cut off")
                except (struct.error, ValueError) as error:
                    raise UserError(f"data {path}: record {number} is not whole ({error})") from None
                try:
                    yield _picture(data, first, first + length)
                except (ValueError, IndexError) as error:
                    yield f"no tf.train.Example ({error})"
                start, number = first + length + 4, number + 1


def _picture(data: mmap.mmap, start: int, stop: int) -> tuple[int, int] | list[str]:
    # field numbers: Example.features 1; Features.feature 1, a map (key 1, value 2); Feature.bytes_list 1; its value 1
    keys = []
    for features in _fields(data, start, stop, 1):
        for entry in _fields(data, *features, 1):
            key = data[slice(*next(_fields(data, *entry, 1), (0, 0)))]
            keys.append(key.decode(errors="replace"))
            if key == KEY:
                for value in _fields(data, *entry, 2):
                    for strings in _fields(data, *value, 1):
                        for first, last in _fields(data, *strings, 1):
                            return first, last - first
                raise ValueError(f"its {KEY.decode()} holds no bytes")
    if not keys:
        raise ValueError("it has no features")
    return sorted(keys)


def _fields(data: mmap.mmap, start: int, stop: int, number: int) -> Iterator[tuple[int, int]]:
    """Start and stop of each length-delimited field with this number in a protobuf message."""
    while start < stop:
        tag, start = _varint(data, start)
        kind = tag & 7
        if kind == 0:
            _, start = _varint(data, start)
        elif kind in (1, 5):
            start += 8 if kind == 1 else 4
        elif kind == 2:
            length, start = _varint(data, start)
            if start + length > stop:
                raise ValueError("a field is longer than its message")
            if tag >> 3 == number:
                yield start, start + length
            start += length
        else:
            raise ValueError(f"wire type {kind}")


def _varint(data: mmap.mmap, start: int) -> tuple[int, int]:
    """Value of the base-128 number at `start`, and the place behind it."""
    value = shift = 0
    while True:
        byte = data[start]
        value, shift, start = value | (byte & 127) << shift, shift + 7, start + 1
        if byte < 128:
            return value, start
        if shift > 63:
            raise ValueError("a number without end")
