"""The code on the pages runs, in their order."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

from tests.helpers.processes import ROOT


@pytest.mark.parametrize("page", ["use-it-in-your-gan.md"])
def test_snippets_run(page: str, capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    text = (ROOT / "docs" / page).read_text()
    snippets = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert len(snippets) >= 8
    names: dict[str, Any] = {}
    for number, snippet in enumerate(snippets):
        exec(compile(snippet, f"{page}, snippet {number}", "exec"), names)
    fast: Any = names["FastBlock"]
    plain: Any = names["Block"]
    torch.manual_seed(1)
    one = plain(8)
    other = fast(8)
    other.load_state_dict(one.state_dict())
    x = torch.randn(2, 8, 4, 4)
    torch.testing.assert_close(other(x), one(x))
    shown = re.findall(r"```text\n(.*?)```", text, re.DOTALL)[0]
    figures = re.compile(r"\d\.\de-\d\d")
    printed = capsys.readouterr().out
    assert figures.sub("#", shown) in figures.sub("#", printed)
    assert re.search(r"^\d+\.\d\dx$", printed, re.MULTILINE)
