"""Vanishing residuals (paper §3.5.1) in a run: the carry goes from 1 to 0, then the nets are the plain ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from fastbegan import Generator, ModelConfig, TrainConfig, TrainStep
from fastbegan.cli import main
from fastbegan.nets.models import build
from fastbegan.runs.checkpoint import list_checkpoints
from fastbegan.runs.folder import RunFolder
from fastbegan.training.graph import GraphedStep
from tests.helpers.processes import TINY
from tests.test_graph import CUDA, fake_cuda  # noqa: F401  # a fixture

MODEL = ModelConfig(size=16, filters=4, hidden=8, latent=8, widths=(1, 1), vanishing=True)
TRAIN = TrainConfig(batch_size=4, carry_steps=5)


def test_a_run_fades_its_layers_in(tmp_path: Path) -> None:
    out = tmp_path / "run"
    flags = "--vanishing --repeats 2 --carry-steps 8 --steps 12 --checkpoint-every 3 --keep 9 --device cpu".split()
    assert main(["train", *TINY, *flags, "--out", str(out)]) == 0
    run = RunFolder(out)
    plain = Generator(replace(run.read_config().model, vanishing=False)).eval()
    z = torch.rand(4, 64) * 2 - 1
    carries = []
    for checkpoint in list_checkpoints(run.checkpoints):
        modules = torch.load(checkpoint / "state.pt", weights_only=True)["modules"]
        found = {name: value.item() for name, value in modules.items() if name.endswith("carry")}
        assert len(found) == 4 and len(set(found.values())) == 1, found  # G, its average, and D's two nets
        fading = Generator(run.read_config().model).eval()
        state = {name.removeprefix("average."): value for name, value in modules.items() if name.startswith("average.")}
        fading.load_state_dict(state)
        plain.load_state_dict({name: value for name, value in state.items() if name != "carry"})
        with torch.no_grad():
            difference = (fading(z) - plain(z)).abs().max().item()
        carries.append((found["average.carry"], difference))
    assert [carry for carry, _ in carries] == pytest.approx([1 - 2 / 8, 1 - 5 / 8, 0, 0])
    assert all(difference > 1e-3 for _, difference in carries[:2])
    assert all(difference < 1e-6 for _, difference in carries[2:])
    with torch.no_grad():  # what is sampled from is the plain net too
        torch.testing.assert_close(run.load_generator()(z), plain(z))


def _step(compile_mode: str | None = None) -> TrainStep:
    return TrainStep(*build(MODEL, seed=0), TRAIN, None, compile_mode)


@pytest.mark.slow
def test_fading_compiles_nothing_again(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []
    compiled = torch.compile
    monkeypatch.setattr(
        torch,
        "compile",
        lambda net, fullgraph, dynamic, mode: compiled(
            net, fullgraph=fullgraph, dynamic=dynamic, backend=lambda graph, _: made.append(graph) or graph
        ),
    )
    torch.compiler.reset()
    step, z = _step("default"), torch.rand(4, 8)
    counts, carries = [], []
    for _ in range(8):
        step(torch.rand(4, 3, 16, 16), z, z)
        assert step.generator.carry is not None
        counts.append(len(made))
        carries.append(round(step.generator.carry.item(), 6))
    torch.compiler.reset()
    assert carries == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0, 0.0]
    assert step.objective.compiled and counts[0] > 0 and set(counts) == {counts[0]}


def test_fading_is_part_of_the_graph(fake_cuda: SimpleNamespace) -> None:  # noqa: F811
    """One capture serves all steps: the carry stays where it is, and follows from the counter on the device."""
    step, real, z = _step(), torch.rand(4, 3, 16, 16), torch.rand(4, 8)
    places = {name: buffer.data_ptr() for name, buffer in step.named_buffers() if name.endswith("carry")}
    captured = []

    def work() -> None:
        captured.append(fake_cuda.capturing)
        step(real, z, z)

    graphed = GraphedStep(work, CUDA)
    for _ in range(9):
        graphed()
    assert graphed.captured and captured.count(True) == 1 and fake_cuda.replayed == 6
    assert len(places) == 4
    assert places == {name: buffer.data_ptr() for name, buffer in step.named_buffers() if name.endswith("carry")}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_graph_fades_as_steps_do() -> None:
    carries = []
    for enabled in (False, True):
        step = TrainStep(*build(MODEL, seed=0, device=CUDA), TRAIN)
        real, z = torch.rand(4, 3, 16, 16, device=CUDA), torch.rand(4, 8, device=CUDA)
        graphed = GraphedStep(lambda step=step, real=real, z=z: step(real, z, z), CUDA, enabled=enabled)
        carries.append([(graphed(), round(step.generator.carry.item(), 6))[1] for _ in range(8)])  # pyright: ignore
        assert graphed.captured == enabled
    assert carries[0] == carries[1] == [1.0, 0.8, 0.6, 0.4, 0.2, 0.0, 0.0, 0.0]
