"""Commands on a pretended device: whole runs, continued runs, two ranks, want of memory, and what else draws there."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastbegan.convert import accelerate
from fastbegan.runs.checkpoint import list_checkpoints
from fastbegan.runs.folder import RunFolder
from tests.helpers.processes import ROOT
from tests.pretended.running import pretended, reports, run

FLAGS = (
    "train --device cuda --size 16 --widths 1 2 --repeats 1 --filters 4 --hidden 8 --latent 8 --data faces:12 "
    "--batch-size 4 --jitter 1 --log-every 4 --sample-every 8 --checkpoint-every 8 --lr 1e-3 --lr-fall 0 "
    "--precision float32"
).split()


def _train(folder: Path, *flags: object, **more: object) -> subprocess.CompletedProcess[str]:
    """`fastbegan train` into folder/run, in processes that find no fault of its."""
    folder.mkdir(exist_ok=True)
    variables = pretended(folder / "cache", "80", "plain", report=folder / "report", **more)
    return run(["-m", "fastbegan", *FLAGS, "--out", folder / "run", *flags], variables)


def _state(folder: Path) -> dict[str, Any]:
    return torch.load(list_checkpoints(folder / "run" / "checkpoints")[-1] / "state.pt", weights_only=True)


def _differ(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """What of two checkpoints differs; sums of a log row start anew with each run."""
    modules = [name for name in one["modules"] if name != "equilibrium.sums"]
    found = [name for name in modules if not torch.equal(one["modules"][name], other["modules"][name])]
    for optimizer in ("optimizer_d", "optimizer_g"):
        for number, kept in one[optimizer]["state"].items():
            moments = other[optimizer]["state"][number]
            found += [f"{optimizer} {number} {name}" for name in kept if not torch.equal(kept[name], moments[name])]
    return found


def _require_clean(folder: Path, processes: int = 1) -> None:
    found = [one for one in reports(folder / "report") if one["graphs"]]
    assert len(found) == processes and all(one["errors"] == [] for one in found), found


@pytest.mark.slow
def test_training_halves_its_rate_and_leaves_checkpoints(tmp_path: Path) -> None:
    done = _train(tmp_path, "--steps", 16, "--lr-window", 2, "--lr-floor", 1e-5, "--lr", 8e-3)
    assert done.returncode == 0, done.stderr
    assert "Pretended sm_80; float32" in done.stdout and "the whole step one CUDA graph" in done.stdout
    assert "could not be captured" not in done.stderr
    _require_clean(tmp_path)
    assert [path.name for path in list_checkpoints(tmp_path / "run" / "checkpoints")] == ["000000008", "000000016"]
    rates = [row["lr"] for row in RunFolder(tmp_path / "run").read_metrics()]
    assert rates[-1] < 8e-3
    assert _state(tmp_path)["optimizer_d"]["param_groups"][0]["lr"].item() == pytest.approx(rates[-1])


@pytest.mark.slow
@pytest.mark.parametrize("loader", ["resident", "packed"])
def test_eight_and_eight_are_sixteen(tmp_path: Path, loader: str) -> None:
    whole = _train(tmp_path / "whole", "--steps", 16, "--loader", loader)
    parts = [_train(tmp_path / "parts", "--steps", steps, "--loader", loader) for steps in (8, 16)]
    assert all(done.returncode == 0 for done in (whole, *parts)), [done.stderr for done in (whole, *parts)]
    assert ", continued at step 8" in parts[1].stdout
    _require_clean(tmp_path / "whole")
    _require_clean(tmp_path / "parts", 2)
    assert _differ(_state(tmp_path / "whole"), _state(tmp_path / "parts")) == []


@pytest.mark.slow
def test_a_run_goes_on_where_there_is_no_gpu(tmp_path: Path) -> None:
    assert _train(tmp_path, "--steps", 8).returncode == 0
    done = _train(tmp_path, "--steps", 12, "--device", "cpu")
    assert done.returncode == 0 and ", continued at step 8" in done.stdout, done.stderr


@pytest.mark.slow
def test_want_of_memory_is_one_line(tmp_path: Path) -> None:
    done = _train(tmp_path, "--steps", 4, memory=1)
    assert done.returncode == 2, done.stderr
    lines = [line for line in done.stderr.splitlines() if not line.startswith("warning: ")]
    assert len(lines) == 1 and lines[0].startswith("error: CUDA out of memory. Tried to allocate"), done.stderr
    assert "less is needed with --recompute" in lines[0]


@pytest.mark.slow
def test_two_ranks_with_their_sum_in_the_graph(tmp_path: Path) -> None:
    assert _train(tmp_path / "one", "--steps", 8).returncode == 0
    variables = pretended(tmp_path / "cache", "80,80", "plain", report=tmp_path / "report")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    command += ["fastbegan", *FLAGS, "--out", str(tmp_path / "run")]
    for steps in ("8", "12"):
        process = subprocess.Popen(
            [*command, "--steps", steps],
            env=variables,
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        try:
            output = process.communicate(timeout=200)[0]
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
        assert process.returncode == 0 and "2 ranks of 2 images a step" in output, output
        assert "could not be captured" not in output and "is not used" not in output, output
        _require_clean(tmp_path, 2)
        assert all("allreduce_" in one["graphs"][0] for one in reports(tmp_path / "report") if one["graphs"])
        (tmp_path / "report").unlink()
        if steps == "8":
            one, two = _state(tmp_path / "one")["modules"], _state(tmp_path)["modules"]
            for name in (name for name in one if name.startswith(("generator.", "discriminator."))):
                torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-6)
    assert "continued at step 8" in output


@pytest.mark.slow
def test_samples_are_those_of_the_cpu(tmp_path: Path) -> None:
    assert _train(tmp_path, "--steps", 4).returncode == 0
    variables = pretended(tmp_path / "cache", tuning="plain", report=tmp_path / "report")
    pictures = []
    for device in ("cuda", "cpu"):
        arguments = ["sample", tmp_path / "run", "--count", 4, "--device", device, "--out", tmp_path / device]
        done = run(["-m", "fastbegan", *arguments], variables)
        assert done.returncode == 0, done.stderr
        pictures.append([path.read_bytes() for path in sorted((tmp_path / device).glob("*.png"))])
    assert pictures[0] == pictures[1] != []
    assert all(one["errors"] == [] for one in reports(tmp_path / "report"))


@pytest.mark.slow
@pytest.mark.parametrize(("gpus", "words"), [("80", "need sm_90"), ("60", "need sm_80"), ("90", "(TMA) or")])
def test_doctor(tmp_path: Path, gpus: str, words: str) -> None:
    variables = pretended(tmp_path, gpus) | {"COLUMNS": "200"}
    flags = "doctor --device cuda --precision float32 --filters 4 --size 8 --batch-size 1"
    done = run(["-m", "fastbegan", *flags.split()], variables)
    assert done.returncode == 0, done.stderr
    assert f"Pretended sm_{gpus}" in done.stdout and words in done.stdout and "conv2d_elu" in done.stdout


_REWRITTEN = """
import importlib
import sys
import torch
from tests.pretended.findings import FINDINGS
source, names, inputs = torch.load(sys.argv[1], weights_only=False)
space = {"torch": torch}
space |= {name: getattr(importlib.import_module(home), function) for name, (home, function) in names.items()}
exec(source, space)
graph = lambda *values: space["forward"](None, *values)
expected = graph(*inputs)[0]
inputs = [value.detach().cuda().requires_grad_() for value in inputs]
y = graph(*inputs)[0]
y.sum().backward()
print(torch.allclose(y.cpu(), expected, atol=1e-5), {str(value.grad.device) for value in inputs})
before = FINDINGS.snapshot()
graph(*inputs)
print(FINDINGS.since(before))
"""


@pytest.mark.slow
@pytest.mark.usefixtures("take_all")
def test_a_rewritten_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dynamo does not look at the pretended device; what it and we made on a CPU runs there, and waits for nothing."""
    seen: list[tuple[Any, Any]] = []

    def keep(module: Any, inputs: Any, *, compiled: bool) -> Any:
        seen.append((module, inputs))
        return module.forward

    monkeypatch.setattr("fastbegan.convert.shell.run", keep)
    layers = (nn.ELU(), nn.Upsample(scale_factor=2), nn.Conv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.SiLU())
    net: Any = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), *layers, nn.Conv2d(8, 3, 3, padding=1), nn.ReLU())
    accelerate(net, example=torch.randn(2, 8, 4, 4))
    assert set(net.fastbegan_report.replaced) == {"0", "3", "4", "6"}
    (module, inputs), *others = seen
    code = module.graph.python_code("self")
    ours = {name: function for name, function in code.globals.items() if callable(function) and "fastbegan" in name}
    names = {name: (function.__module__, function.__name__) for name, function in ours.items()}
    torch.save((code.src, names, inputs), tmp_path / "graph.pt")
    done = run(["-c", _REWRITTEN, str(tmp_path / "graph.pt")], pretended(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not others and len(names) == 4 and done.stdout.splitlines() == ["True {'cuda:0'}", "[]"], done.stdout


_RACED = """
import torch
from fastbegan_kernels import tuning
from fastbegan_kernels.replacement import Replacement, pays
device = torch.device("cuda", 0)
problems = [
    Replacement("up", "elu", "float32", (2, 16, 8, 8), (16, 16, 3, 3), backward=True),
    Replacement("norm", "silu", "float32", (2, 16, 8, 8), groups=4, backward=True, channels_last=True),
    Replacement("down_end", "silu", "float16", (2, 16, 8, 8), (8, 16, 3, 3), bias=False),
]
print([tuning._known(problem, device, "auto") for problem in problems])
print([pays(problem, device) for problem in problems])
"""


@pytest.mark.slow
@pytest.mark.parametrize("fastest", ["replaced", "untouched"])
def test_a_chain_is_raced_against_the_layers_as_they_are(fastest: str, tmp_path: Path) -> None:
    """Both are checked, the faster is taken, and kept for the next process."""
    variables = pretended(tmp_path, "80", fastest)
    del variables["PRETENDED_TRUST"]
    for known in (None, fastest):
        done = run(["-c", _RACED], variables)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == [str([known] * 3), str([fastest == "replaced"] * 3)], done.stdout
