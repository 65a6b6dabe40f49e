"""The cross-compile gate: every shipped configuration compiles for absent GPUs without spilling a register.

`cross_compiled.json` beside this holds what was recorded; `python tests/kernels/test_cross_compile.py` records it anew.
Register use moves between Triton versions, so only the recorded version is held to the record.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pytest

from tests.helpers import tile_model

ROOT = Path(__file__).parents[2]
RECORD = Path(__file__).parent / "cross_compiled.json"
SHARED = {60: 49_152, 80: 166_912, 90: 232_448, 100: 232_448, 103: 232_448, 120: 101_376}  # bytes of one block
MATRIX = {80: ("HMMA", "LDGSTS"), 90: ("HGMMA", "LDGSTS")}  # pointer kernels: matrix units, asynchronous copies


def _compiled(capability: int, part: str = "", site: Path | None = None) -> list[dict[str, Any]]:
    paths = [str(ROOT / "kernels"), str(ROOT), *([str(site)] if site else [])]
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}  # interpreted code has no binary
    environment |= {"PYTHONPATH": os.pathsep.join(reversed(paths)), "TRITON_DEFAULT_FP_FUSION": "1"}
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "cross_compile.py"), str(capability), part]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1100, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def _check(rows: list[dict[str, Any]], capability: int, at_least: int = 120) -> None:
    assert len(rows) >= at_least
    for row in rows:
        assert row["stack"] == row["LDL"] == row["STL"] == 0, row
        assert row["registers"] <= 255 and row["shared"] <= SHARED[capability], row
        if "conv" not in row["kernel"] or "fp32" in row["kernel"]:
            continue
        if " tma " in row["kernel"]:
            assert row["UTMALDG"], row
            if capability == 90:  # both factors go from shared memory to the matrix units
                assert row["HGMMA"] and not row["LDSM"], row
        elif "odd" not in row["kernel"] and "tf32" not in row["kernel"]:
            assert all(row[word] for word in MATRIX.get(capability, ())), row


@pytest.mark.timeout(1200)  # with nothing in Triton's cache, beside another worker
@pytest.mark.parametrize(
    ("capability", "part", "at_least"),
    [
        pytest.param(60, "", 12, id="60", marks=pytest.mark.core),
        # a few of the next ones: those take minutes
        pytest.param(90, "upconv forward bf16", 8, id="90-upconv", marks=pytest.mark.slow),
        *(pytest.param(sm, "", 120, id=str(sm), marks=pytest.mark.slow) for sm in (80, 90, 100)),
        *(pytest.param(sm, "", 14, id=str(sm), marks=pytest.mark.slow) for sm in (103, 120)),
    ],
)
def test_every_configuration_compiles_without_spilling(capability: int, part: str, at_least: int) -> None:
    rows = _compiled(capability, part)
    print(_figures(rows))
    _check(rows, capability, at_least)
    record = json.loads(RECORD.read_text())
    if record["triton"] == version("triton"):
        recorded = {row["kernel"]: row for row in record["rows"] if row["sm"] == capability and part in row["kernel"]}
        assert recorded.keys() == {row["kernel"] for row in rows}
        for row in rows:
            for figure in ("registers", "shared"):
                assert row[figure] <= recorded[row["kernel"]][figure], (figure, row)


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("capability", [80, 90])
def test_also_with_the_triton_of_common_images(capability: int, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "triton==3.6.0"]
    subprocess.run(command, check=True, timeout=300)
    _check(_compiled(capability, site=tmp_path), capability)


def _figures(rows: list[dict[str, Any]]) -> str:
    """One row per tile: the largest register count of its products / KiB of shared memory, in bf16."""
    found: dict[tuple[str, int], tuple[int, int]] = {}
    for row in rows:
        label, _, tile = row["kernel"].removesuffix(" flat").partition(" bf16 ")
        if "conv" in label and tile:
            registers, shared = found.get((tile, row["sm"]), (0, 0))
            found[tile, row["sm"]] = max(registers, row["registers"]), max(shared, row["shared"])
    lines = [
        "| tile: pixels x outputs x inputs, warps, stages | sm_80 | sm_90 | sm_100 | sm_103 | sm_120 |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for tile in dict.fromkeys(tile for tile, _ in found):
        cells = (found.get((tile, sm)) for sm in (80, 90, 100, 103, 120))
        lines.append(f"| {tile} | {' | '.join(f'{c[0]} / {c[1] // 1024}' if c else '-' for c in cells)} |")
    return "\n".join(("registers a thread / KiB of shared memory a program, the most of any product", "", *lines, ""))


README = ROOT / "kernels" / "README.md"
TABLES = {"figures": _figures, "model": tile_model.table}  # by the name in the README's markers
MARK, END = "<!-- {}: made by tests/kernels/test_cross_compile.py -->\n", "<!-- end of {} -->"


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_shows_the_record(name: str) -> None:
    shown = README.read_text().partition(MARK.format(name))[2].partition(END.format(name))[0]
    assert shown == TABLES[name](json.loads(RECORD.read_text())["rows"])


def _record() -> None:
    found = [row for capability in SHARED for row in _compiled(capability)]
    lines = ",\n".join(json.dumps(row) for row in found)
    RECORD.write_text(f'{{"triton": "{version("triton")}", "rows": [\n{lines}\n]}}\n')
    text = README.read_text()
    for name, table in TABLES.items():
        head, mark, rest = text.partition(MARK.format(name))
        _, end, tail = rest.partition(END.format(name))
        text = head + mark + table(found) + end + tail
    README.write_text(text)


if __name__ == "__main__":
    _record()
