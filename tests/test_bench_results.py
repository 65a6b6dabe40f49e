"""Rows, tables, plots and plans of `fastbegan bench`: figures are what was put in, and labelled as what they are."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from fastbegan import PRESETS, UserError
from fastbegan.cli import main
from fastbegan.measure import machine, plan, report
from fastbegan.measure.results import Results, Row, ratio, spread
from fastbegan.training.cost import step_cost

ROOT = Path(__file__).resolve().parent.parent
ROOFLINE = {"copy_bytes_per_s": 1e10, "flop_per_s": {"float32": 1e11}}


def _results(date: str = "2026-01-01", **changes: Any) -> Results:
    facts = {"device": "CPU Test", "threads": 2, "instructions": "AVX2", "torch": "2.15.0", "commit": "abc"}
    step = Row(
        "step",
        "64 px single-pass",
        ms=100.0,
        p20=90.0,
        p80=110.0,
        ratios={"eager": 1.9, "compile": 1.8},
        images=16,
        flops=5 * 10**9,
        textbook_flops=9 * 10**9,
        counts={"operations": 824},
        breakdown={"conv": 0.7, "the rest": 0.3},
    )
    layer = Row("fold", "n 32", ms=2.0, ratios={"eager": 0.8}, flops=10**6, moved=10**7)
    return Results({**facts, "date": date, **changes}, ROOFLINE, [step, layer])


def test_ratios_are_of_turns_and_spreads_of_times() -> None:
    assert ratio([2.0, 30.0, 200.0], [1.0, 10.0, 100.0]) == 2.0  # a machine that gets slower hits both
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == (2.0, 3.5, 5.0)


def test_the_nearer_ceiling_is_the_one_that_takes_longer() -> None:
    step, layer = _results().rows
    assert step.bound(ROOFLINE) == (pytest.approx(0.5), "matrix")
    assert layer.bound(ROOFLINE) == (pytest.approx(0.5), "copy")
    assert Row("a", "b", ms=1.0, flops=10, precision="bf16").bound(ROOFLINE) is None  # no such ceiling was measured


def test_results_come_back_as_they_were(tmp_path: Path) -> None:
    _results().save(tmp_path / "a" / "b.json")
    assert Results.load(tmp_path / "a" / "b.json") == _results()
    (tmp_path / "c.json").write_text('{"rows": [{"speed": 1}], "machine": {}, "roofline": {}}')
    with pytest.raises(UserError, match="does not hold results"):
        Results.load(tmp_path / "c.json")


def test_facts_and_ceilings_of_this_machine() -> None:
    device = torch.device("cpu")
    facts = machine.facts(device)
    assert facts["device"].startswith("CPU ") and facts["torch"] == torch.__version__ and facts["threads"] >= 1
    assert machine.slug({"device": "NVIDIA H100 80GB HBM3"}) == "nvidia-h100-80gb-hbm3"
    measured = machine.roofline(device, quick=True)
    assert 1e8 < measured["copy_bytes_per_s"] < 1e13 and 1e8 < measured["flop_per_s"]["float32"] < 1e14


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, date in enumerate(("2026-01-02", "2026-01-01")):
        _results(date, commit=f"c{number}").save(tmp_path / "in" / f"{number}.json")
    assert main(["bench", "report", str(tmp_path / "in")]) == 0
    printed = capsys.readouterr().out
    assert "commit c0" in printed and "commit c1" not in printed  # the newest of a device
    row = "| 64 px single-pass | 100 | 90-110 | 160 | 50 GFLOP/s (textbook's 90) | 50% of matrix | - | 1.90 eager, 1.80"
    assert row in printed and "step 64 px single-pass: operations 824" in printed
    assert "Where the time of step 64 px single-pass goes: conv 70%, the rest 30%" in printed
    assert main(["bench", "report", str(tmp_path / "in"), "--out", str(tmp_path / "out")]) == 0
    text = (tmp_path / "out" / "report.md").read_text()
    pictures = sorted(path.name for path in (tmp_path / "out").glob("*.png"))
    assert pictures == [f"cpu-test-2-avx2-{name}.png" for name in ("breakdown", "history", "roofline", "speed-up")]
    for name in pictures:
        assert f"]({name})" in text
        with Image.open(tmp_path / "out" / name) as image:
            image.verify()


def test_report_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report", str(tmp_path)]) == 2
    assert "no results in" in capsys.readouterr().err


def test_the_page_says_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "report", str(ROOT / "bench" / "results"), "--summary"]) == 0
    made = capsys.readouterr().out
    text = (ROOT / "docs" / "speed.md").read_text(encoding="utf-8")
    section = text.partition("<!-- speed: made by `fastbegan bench report --summary` -->\n")[2]
    assert section.partition("<!-- end of speed -->")[0] == made
    assert "No GPU has been measured yet" in report.summary([_results()])
    assert "No GPU has been measured yet" not in report.summary([_results(capability="9.0")])


def test_a_plan_is_the_sum_of_its_parts() -> None:
    preset = PRESETS["paper-128"]
    one = plan.plan(preset.model, preset.train, plan.Cluster("a100"), images=7_000_000, share=0.25)
    assert one.arithmetic == pytest.approx(step_cost(preset.model, preset.train).flops / (0.25 * 312e12))
    assert one.communication == 0 and one.limit == "compute" and one.fits and not one.measured
    assert one.hours == pytest.approx(7e6 / one.images_per_second / 3600)
    assert one.kwh == pytest.approx(one.hours * 0.4)
    many = plan.plan(preset.model, preset.train, plan.Cluster("a100", 32), images=7_000_000, share=0.25)
    assert 8 < many.images_per_second / one.images_per_second < 32  # the network costs something
    assert many.step == pytest.approx(one.step + many.communication)
    assert many.efficiency == pytest.approx(many.images_per_second / one.images_per_second / 32)
    # a ring moves each value almost twice, over the slowest link: here that between nodes, D's with nothing beside it
    cost = step_cost(preset.model, preset.train)
    of_d = 4 * (cost.parameters - cost.generator)
    assert many.sent == 4 * 17_334_214 and 0.3 < cost.after_generator / cost.flops < 0.5
    assert many.communication >= 2 * 31 / 32 * of_d / 10e9
    assert many.communication < 2 * 31 / 32 * many.sent / 10e9
    slow = plan.plan(preset.model, preset.train, plan.Cluster("a100", 8, link="pcie"), images=1, share=0.25)
    fast = plan.plan(preset.model, preset.train, plan.Cluster("a100", 8), images=1, share=0.25)
    assert slow.communication > 5 * fast.communication
    large = PRESETS["paper-256"]
    full = plan.plan(large.model, large.train.__class__(batch_size=4096), plan.Cluster("p100"), images=1)
    assert not full.fits


def test_plans_say_what_is_measured_and_what_assumed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["bench", "plan", "--results", str(tmp_path)]
    assert main([*arguments, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [one["gpu"].split()[0] for one in plans] == ["P100", "V100", "A100", "H100", "B200"]
    assert not any(one["measured"] for one in plans)
    measured = _results(device="NVIDIA H100 80GB HBM3", capability="9.0")
    measured.rows[0].precision, measured.rows[0].ms, measured.rows[0].flops = "bf16", 1.0, 3 * 10**11
    measured.save(tmp_path / "h100.json")
    assert main([*arguments, "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    shares = {one["gpu"]: (one["measured"], one["share"]) for one in plans}
    assert shares["H100"] == (True, pytest.approx(3e14 / 989e12)) and not shares["A100 80 GB"][0]
    assert main([*arguments, "--gpu", "h100", "--gpus", "2"]) == 0
    printed = " ".join(capsys.readouterr().out.split())
    assert "a model, not a measurement" in printed and "30%" in printed and "30%?" not in printed
    assert "that each would allow alone: compute" in printed


def test_an_all_reduce_is_a_ring_or_a_tree() -> None:
    seconds = plan.all_reduce_seconds
    assert seconds(10**9, 1, 1e9, 1e-3) == 0
    assert seconds(10**9, 4, 1e9, 1e-3) == pytest.approx(1.5 + 6e-3)  # a ring: 6 hops, 3/4 of it twice
    assert seconds(10**6, 512, 1e9, 1e-3) == pytest.approx(2e-3 + 18e-3)  # a tree: 9 levels up and down


def test_how_far_it_scales(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plan", "--gpu", "h100", "--gpus", "1,8,64,512", "--json"]) == 0
    plans = json.loads(capsys.readouterr().out)["plans"]
    assert [one["gpus"] for one in plans] == [1, 8, 64, 512]
    assert plans[0]["efficiency"] == 1
    assert all(a["efficiency"] > b["efficiency"] for a, b in pairwise(plans))
    assert plans[-1]["limit"] == "network"


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--gpu", "tpu"], "gpu is 'tpu'; accepted: p100, v100, a100, h100, b200"),
        (["--gpus", "0"], "gpus is 0; accepted: whole numbers from 1"),
        (["--gpus", "1,x"], "gpus is '1,x'; accepted: whole numbers from 1, with commas between"),
        (["--network", "0"], "network is 0; accepted: numbers above 0"),
        (["--share", "2"], "share is 2.0; accepted: above 0 and up to 1"),
    ],
)
def test_bad_plans(flags: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "plan", *flags]) == 2
    assert capsys.readouterr().err.startswith(f"error: {message}")
