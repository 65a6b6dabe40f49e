"""The page of `fastbegan explore`: pictures encoded into a budget of bytes, pieces of HTML, and the template."""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import re
from collections.abc import Sequence
from pathlib import Path
from string import Template
from typing import Any

import numpy as np
from PIL import Image

from ..config import TrainConfig
from ..evaluation.nearest import Comparison, Neighbour

_QUALITIES = (95, 90, 85, 80, 70, 60, 50)  # of JPEG, tried in this order
_LONG = 16  # characters of a fact from which on it gets a line of its own


class _Page(Template):
    delimiter = "@@"  # the page's script uses dollars itself


def encode(pictures: Sequence[np.ndarray], room: float) -> list[str]:
    """Encode pictures, uint8 [H, W, 3], as data: URLs whose files take at most `room` bytes in all.

    They are PNGs where those fit, else JPEGs of the best quality that fits, at half the size if need be.
    """
    images, kind = [Image.fromarray(picture) for picture in pictures], "png"
    files = _files(images, room, "PNG")
    while files is None:
        kind = "jpeg"
        tries = (_files(images, room, "JPEG", quality=quality, subsampling=0) for quality in _QUALITIES)
        files = next((files for files in tries if files is not None), None)
        images = [image.reduce(2) for image in images]
    return [f"data:image/{kind};base64,{base64.b64encode(file).decode()}" for file in files]


def _files(images: Sequence[Image.Image], room: float, kind: str, **options: Any) -> list[bytes] | None:
    """The pictures as files; None where they take more than `room` bytes."""
    files = []
    for image in images:
        image.save(buffer := io.BytesIO(), kind, **options)
        files.append(buffer.getvalue())
        room -= len(files[-1])
        if room < 0:
            return None
    return files


def nearest_section(comparison: Comparison, train: TrainConfig, room: float) -> str:
    """Write the section on nearest training images.

    Args:
        comparison: Generated images and their neighbours.
        train: Settings of the run, which the text names.
        room: Bytes that the pictures may take in all.

    Returns:
        HTML.
    """
    files = iter(encode([picture for row in comparison.pictures for picture in row], room))
    rows = [_row(number, row, [next(files) for _ in range(1 + len(row))]) for number, row in enumerate(comparison.rows)]
    return f'{_explanation(comparison, train)}<ol class="nearest">{"".join(rows)}</ol>'


def _explanation(comparison: Comparison, train: TrainConfig) -> str:
    mirrored = ", mirrored ones (⇄) among them, since training mirrors half" if train.flip else ""
    middle = (
        f"; the middle of each counts, since training shifts by up to {train.jitter} pixels" if train.jitter else ""
    )
    text = (
        f'<p class="lede">Has G learned its training images by heart? Beside each of {len(comparison.rows)} generated '
        f"images stand the nearest of all {comparison.total:,} training images{mirrored}{middle}. The number is their "
        "distance, the root mean square difference of pixel values, which go from 0 to 255: copies would have a "
        "distance near 0. Smooth images are nearer to everything than sharp ones, and a shifted copy is not near: look "
        "as well.</p>"
    )
    if comparison.between_training is None or comparison.to_training is None:
        return text
    return (
        f"{text}<p>As a yardstick: a training image is <strong>{comparison.between_training:.1f}</strong> from the "
        f"nearest other one (median, measured on {comparison.measured:,} of them). These generated images are "
        f"<strong>{comparison.to_training:.1f}</strong> from theirs.</p>"
    )


def _row(number: int, row: list[Neighbour], files: list[str]) -> str:
    tiles = [(f"generated image {number}", f"image {number}")]
    for near in row:
        turned, mark = (", mirrored", " ⇄") if near.mirrored else ("", "")
        alt = f"training image {near.number}{turned}, distance {near.distance:.1f}"
        tiles.append((alt, f"{near.distance:.1f}{mark}"))
    figures = [
        f'<figure><img src="{file}" alt="{alt}" title="{alt}"><figcaption>{words}</figcaption></figure>'
        for file, (alt, words) in zip(files, tiles, strict=True)
    ]
    return f"<li>{''.join(figures)}</li>"


def note(line: str) -> str:
    """A line as a note."""
    return f'<p class="note">{html.escape(line[0].upper() + line[1:])}.</p>'


def fact_list(facts: list[tuple[str, str]]) -> str:
    """Names and values as entries of a <dl>."""
    items = []
    for name, value in facts:
        kind = ' class="wide"' if len(value) > _LONG else ""
        items.append(f"<div{kind}><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>")
    return "".join(items)


def training_notes(rows: list[dict[str, Any]], sheets: dict[str, Any] | None, lost: int, *, damaged: bool) -> str:
    """Write the notes on curves and sheets that are missing.

    Args:
        rows: Rows of metrics.
        sheets: The data of the sheets; None where there are none.
        lost: Number of sheets that cannot be read.
        damaged: Whether metrics.jsonl is damaged.

    Returns:
        HTML, empty where nothing is missing.
    """
    notes = [] if sheets or lost else ["there are no sheets yet: samples/ of the run holds none"]
    notes += [f"{lost} of the sheets could not be read and {'is' if lost == 1 else 'are'} left out"] if lost else []
    problem = "is damaged" if damaged else "has no rows yet"
    notes += [] if rows else [f"there are no curves: metrics.jsonl of the run {problem}"]
    return "".join(map(note, notes))


def fill(values: dict[str, Any], **texts: str) -> str:
    """Fill explore.html: `values` become the data of its script, `texts` its pieces of HTML.

    The page's content security policy allows the template's own style and script, data: images, and nothing else.
    """
    template = Path(__file__).with_name("explore.html").read_text(encoding="utf-8")
    policy = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for kind in ("style", "script"):
        match = re.search(rf"<{kind}>(.*?)</{kind}>", template, re.DOTALL)
        assert match is not None and "@@" not in match[1]  # filled in, they would have another hash
        digest = base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode()
        policy.append(f"{kind}-src 'sha256-{digest}'")
    data = json.dumps(values, separators=(",", ":"), allow_nan=False)
    for character in "<>&":  # "</script>" ends a script even inside a string
        data = data.replace(character, f"\\u{ord(character):04x}")
    return _Page(template).substitute(texts, data=data, policy="; ".join(policy))
