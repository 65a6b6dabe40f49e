"""Which files count, each once."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from fastbegan import UserError
from fastbegan.data.decode import Decoding
from fastbegan.data.folder import list_images


def test_each_picture_is_listed_once_whatever_links_there_are(pictures: Path) -> None:
    (pictures / "loop").symlink_to(pictures)
    (pictures / "nested" / "up").symlink_to(pictures / "nested")
    (pictures / "again.jpg").symlink_to(pictures / "02.jpg")
    (pictures / "dangling.png").symlink_to(pictures / "nowhere.png")
    (pictures / ".hidden.png").write_bytes(b"")
    (pictures / "notes.txt").write_text("notes")
    os.mkfifo(pictures / "pipe.jpg")
    listing = list_images(pictures)
    assert len(listing.images) == 14 and listing.images == sorted(listing.images)
    assert [(file.path, file.reason.partition(" (")[0]) for file in listing.images if file.reason] == [
        ("dangling.png", "cannot be opened"),
        ("pipe.jpg", "not a regular file"),
    ]
    again = "links to what is taken already"
    assert listing.left_out(Path("x")) == [
        ("x/notes.txt", ".txt"),
        ("x/.hidden.png", "hidden"),
        ("x/again.jpg", again),
        ("x/loop", again),
        ("x/nested/up", again),
    ]


@pytest.mark.parametrize("crop", ["", "middle", "0", "-3", "2.5"])
def test_wrong_crops_are_named(crop: str) -> None:
    with pytest.raises(UserError, match="accepted: center, none, celeba, or a number of pixels"):
        Decoding(crop)
