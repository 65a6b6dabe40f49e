"""The pages in docs/reference/ are what the docstrings say now, and nothing public is without one."""

from __future__ import annotations

import re
from pathlib import Path

from docs import make_reference
from tests.helpers.processes import ROOT

PAGES = make_reference.pages()


def test_the_pages_are_what_the_script_makes() -> None:
    kept = {path.name: path.read_text(encoding="utf-8") for path in make_reference.FOLDER.iterdir()}
    assert kept.keys() == PAGES.keys()
    other = [name for name, text in PAGES.items() if kept[name] != text]
    assert not other, f"{', '.join(other)} is not what the docstrings say: run make reference"


def test_everything_public_has_a_docstring() -> None:
    assert make_reference.undocumented() == []


def test_every_link_leads_somewhere() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "(docs/reference/README.md)" in readme
    for name, text in PAGES.items():
        assert not re.search(r" at 0x|/home/|" + re.escape(str(ROOT)), text), name
        for target in re.findall(r"\]\(([^)]+)\)", text):
            page, _, anchor = target.partition("#")
            assert (make_reference.FOLDER / page).exists() if page else anchor, f"{name}: {target}"
            if anchor:
                headings = re.findall(r"^##+ (.+)$", PAGES[Path(page).name or name], re.MULTILINE)
                assert anchor in [heading.lower() for heading in headings], f"{name}: {target}"
