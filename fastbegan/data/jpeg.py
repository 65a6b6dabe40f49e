"""What the headers of a JPEG tell beside its size. Reads a few bytes of each segment, since every file passes here."""

from __future__ import annotations

from typing import NamedTuple

_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_ICC = b"ICC_PROFILE\0"


class Marks(NamedTuple):
    """What headers tell of colours and rotation."""

    may_be_turned: bool
    """They have EXIF, or XMP with an orientation."""
    info: dict[str, bytes | None]
    """`icc_profile` as in Pillow: absent, or None where its parts do not fit together."""


def read_marks(data: bytes) -> Marks:
    """Walk over the segments before the first scan."""
    may_be_turned, profile = False, list[bytes]()
    at, last = 2, len(data) - 4
    while 0 <= at <= last:
        kind = data[at + 1]
        if data[at] != 0xFF or kind == 0xFF:  # decoders skip junk, and any number of 0xFF before a marker
            at = data.find(b"\xff", at + 1)
            continue
        if kind in (0xDA, 0xD9):
            break
        if kind <= 0x01 or 0xD0 <= kind <= 0xD8:  # no length follows
            at += 2
            continue
        start, end = at + 4, at + 2 + int.from_bytes(data[at + 2 : at + 4], "big")
        if kind == 0xE1:
            xmp = data.startswith(_XMP, start) and data.find(b"Orientation", start, end) >= 0
            may_be_turned |= xmp or data.startswith(b"Exif\0", start)
        elif kind == 0xE2 and data.startswith(_ICC, start) and end >= start + 14:
            profile.append(data[start + len(_ICC) : end])
        at = end
    if not profile:
        return Marks(may_be_turned, {})
    profile.sort()  # each part begins with its number and the number of parts
    whole = [tuple(part[:2]) for part in profile] == [(number + 1, len(profile)) for number in range(len(profile))]
    return Marks(may_be_turned, {"icc_profile": b"".join(part[2:] for part in profile) or None if whole else None})
