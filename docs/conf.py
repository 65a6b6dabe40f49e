"""The documentation site: `make docs` builds it into docs/_build/html, and fails on any warning."""

import re
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

from fastbegan.version import __version__

HERE = Path(__file__).resolve().parent
# pages of the repository that are pages of the site, too
INCLUDED = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "kernels/README.md": "kernels.md",
    "tests/ptx/README.md": "ptx.md",
}

project, release = "fastbegan", __version__
copyright = "The fastbegan authors, Apache-2.0"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
myst_heading_anchors = 3
default_role = "code"  # docstrings have Markdown's single backquotes
napoleon_use_rtype = False
autodoc_member_order = "bysource"
html_theme = "furo"
html_title = f"fastbegan {release}"


def _follow_links(app: Sphinx, relative: Path, parent: str, content: list[str]) -> None:
    """Links of an included page are relative to its own folder; those to pages of the site become links to them."""
    file = (HERE / relative).resolve()

    def page(match: re.Match[str]) -> str:
        path, _, anchor = match[1].partition("#")
        target = (file.parent / path).resolve()
        name = INCLUDED.get(str(target.relative_to(HERE.parent)), "") if target.is_relative_to(HERE.parent) else ""
        if not name and target.is_relative_to(HERE):
            name = str(target.relative_to(HERE))
        return f"]({name}{'#' + anchor if anchor else ''})" if name else match[0]

    content[0] = re.sub(r"\]\(((?!https?:)[^)#]+[^)]*)\)", page, content[0])


def setup(app: Sphinx) -> dict[str, Any]:
    """Called by Sphinx."""
    app.connect("include-read", _follow_links)
    return {"parallel_read_safe": True}
