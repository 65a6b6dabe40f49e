"""The code on the pages runs, by Sybil: Python as it stands, commands of the shell as `tests/helpers/shell.py` says."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from sybil import Sybil
from sybil.document import Document
from sybil.parsers.markdown import CodeBlockParser, PythonCodeBlockParser

from fastbegan.cli import main
from tests.helpers import shell
from tests.helpers.processes import ROOT

PAGES = sorted(
    str(path.relative_to(ROOT))
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "docs").glob("gallery/**/*.md"))
)
FENCE = re.compile(r"^```(\w+)", re.MULTILINE)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder with what the pages name: photographs, a run, and a link to the project's files."""
    folder = tmp_path_factory.mktemp("pages")
    for name in ("examples", "bench", "tests", "Makefile", "constraints.txt", "Dockerfile"):
        (folder / name).symlink_to(ROOT / name)
    for name in ("PHOTOS", "OTHER"):
        (folder / name).mkdir()
        for number in range(8):
            Image.effect_noise((80, 80), 40 + number).convert("RGB").save(folder / name / f"{number}.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        flags = "--size 16 --widths 1 2 --filters 2 --hidden 4 --latent 4 --batch-size 4 --steps 3 --data faces:16"
        assert main(["train", *flags.split(), "--device", "cpu", "--out", "runs/mine"]) == 0
        yield folder


def _parsed(page: str) -> Document:
    parsers = [PythonCodeBlockParser(), CodeBlockParser("sh", lambda example: shell.run(example.parsed))]
    return Sybil(parsers=parsers).parse(ROOT / page)


@pytest.mark.parametrize("page", PAGES)
def test_snippets_run(page: str, place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    kinds = set(FENCE.findall((ROOT / page).read_text(encoding="utf-8")))
    assert kinds <= {"python", "sh", "text"}, f"{page}: a fence of a kind that nothing runs"
    document = _parsed(page)
    for example in document.examples():
        example.evaluate()
    if page == "docs/drop-in.md":
        _check_drop_in(document, capsys.readouterr().out)


def _check_drop_in(document: Document, printed: str) -> None:
    torch.manual_seed(1)
    names: dict[str, Any] = document.namespace
    plain, fast = names["Block"](8), names["FastBlock"](8)
    fast.load_state_dict(plain.state_dict())
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(fast(x), plain(x))
    shown = re.findall(r"```text\n(.*?)```", document.text, re.DOTALL)[0]
    figures = re.compile(r"\d\.\de-\d\d")
    assert figures.sub("#", shown) in figures.sub("#", printed)
    assert re.search(r"^\d+\.\d\dx$", printed, re.MULTILINE)


@pytest.mark.parametrize(
    "line", ["fastbegan train --no-such", "fastbegan paint", "make no-such-target", "frobnicate", "pytest no/such.py"]
)
def test_a_command_that_is_wrong_is_found(line: str, place: Path) -> None:
    with pytest.raises((AssertionError, SystemExit)):
        shell.run(line)


def test_the_readme_is_short() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    lines = text.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 120 and len(text.encode()) <= 9000
