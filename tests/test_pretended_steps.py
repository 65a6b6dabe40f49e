"""Steps on a pretended device: captured they are what they are stepped, bit for bit, and wait for nothing."""

from __future__ import annotations

from typing import Any

import pytest

from tests.pretended.running import once, pretended, rows, run
from tests.pretended.scenarios import STEPS, VARIANTS

Row = dict[str, Any]
FAST = ("default", "fp16 overflow")
SLOW = [name for name in VARIANTS if name not in FAST]
# what NumPy says of fp16's infinities in Triton's interpreter
_OF_NUMPY = ("invalid value encountered", "overflow encountered", "divide by zero encountered")


def _group(name: str) -> str:
    """Variants of a group share a process, whose start takes as long as they do; two groups take two cores."""
    return "pretended steps" if name in FAST else f"pretended steps {SLOW.index(name) % 2}"


@pytest.fixture
def row(name: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Row:
    """What became of a variant; the first one of its group runs all that were selected."""

    def made() -> dict[str, Row]:
        parameters = [getattr(item, "callspec", None) for item in request.session.items]
        selected = {one.params.get("name") for one in parameters if one is not None}
        names = [other for other in VARIANTS if other in selected and _group(other) == _group(name)]
        variables = pretended(tmp_path_factory.mktemp("steps"))
        return rows(run(["-m", "tests.pretended.scenarios", *names], variables, 560))

    return once(tmp_path_factory, _group(name), made)[name]


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=[pytest.mark.xdist_group(_group(name)), *([] if name in FAST else [pytest.mark.slow])])
        for name in VARIANTS
    ],
)
def test_a_captured_step_is_the_step_and_does_not_wait(row: Row, name: str) -> None:
    _check(name, row)


def _check(name: str, found: Row) -> None:
    variant = VARIANTS[name]
    assert found["errors"] == [] and found["captured"], found
    assert found["differ"] == [] and found["moments that differ"] == 0
    assert found["rows"][0] == found["rows"][1]
    assert found["steady"] == []  # no wait for the device, and no copy to it
    assert [line for line in found["warnings"] if not line.startswith(_OF_NUMPY)] == []
    assert found["bad"] == variant.poisoned
    assert found["not finite"] == (["equilibrium.k"] if variant.poisoned else [])
    if name == "fp16 overflow":  # a power of two less a step, and nothing was learned
        assert found["loss scale"] == 2.0 ** (30 - STEPS) and set(found["rows"][0]) == {0.0}


@pytest.mark.parametrize(
    ("gpus", "tuning", "name", "kernel"),
    [
        ("80", "plain", "default", None),  # no kernel was right: all is PyTorch's own
        pytest.param("60", "library", "default", "_fold_kernel", marks=pytest.mark.slow),
        pytest.param("70", "plain", "fp16", None, marks=pytest.mark.slow),
        pytest.param("90", "tma", "fp16 of 8", "_conv_tma_kernel", marks=pytest.mark.slow),
        pytest.param("100", "library", "default", "_activation_kernel", marks=pytest.mark.slow),
    ],
)
def test_steps_of_other_kernels_and_cards(
    gpus: str, tuning: str, name: str, kernel: str | None, tmp_path_factory: pytest.TempPathFactory
) -> None:
    variables = pretended(tmp_path_factory.mktemp("steps"), gpus, tuning)
    found = rows(run(["-m", "tests.pretended.scenarios", name], variables, 560))[name]
    _check(name, found)
    assert kernel in found["kernels"] if kernel else found["kernels"] == []
