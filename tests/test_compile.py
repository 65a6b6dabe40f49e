"""torch.compile over the step: one graph a pass, compiled once, with the same results; and life without it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from fastbegan import ModelConfig, TrainConfig, TrainStep, UserError
from fastbegan.device import pick_compile
from fastbegan.nets.models import build
from fastbegan.training.objective import OBJECTIVES

MODEL = ModelConfig(size=32, filters=4, hidden=8, latent=8)
TRAIN = TrainConfig(batch_size=4, lr=1e-3)


@pytest.fixture(autouse=True)
def _forget() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def _batch() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.rand(4, 3, 32, 32) * 2 - 1, torch.rand(4, 8) * 2 - 1


@pytest.mark.parametrize(
    ("passes", "updates", "latents"),
    [
        ("single-pass", "simultaneous", "shared"),
        pytest.param("joint", "simultaneous", "shared", marks=pytest.mark.slow),
        pytest.param("single-pass", "alternating", "independent", marks=pytest.mark.slow),
    ],
)
def test_no_graph_breaks_and_no_recompiles(
    passes: str, updates: str, latents: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs: list[torch.fx.GraphModule] = []

    def keep(graph: torch.fx.GraphModule, _: object) -> torch.fx.GraphModule:
        graphs.append(graph)
        return graph

    compiled = torch.compile

    def compile_and_keep(net: torch.nn.Module, *, fullgraph: bool, dynamic: bool, mode: str) -> object:
        return compiled(net, fullgraph=fullgraph, dynamic=dynamic, backend=keep)

    monkeypatch.setattr(torch, "compile", compile_and_keep)
    train = replace(TRAIN, passes=passes, updates=updates, latents=latents)
    steps = [TrainStep(*build(MODEL, seed=0), train, None, mode) for mode in (None, "default")]
    real, z = _batch()
    for _ in range(2):  # with fullgraph=True a break would be an error, and a warning here is one
        for step in steps:
            step(real, z, -z)
    assert steps[1].objective.compiled
    made = len(graphs)
    # G, and D of G(z) and of x; joined they are one; D without weight gradients is one more, G without any too
    assert made == {"joint": 2, "single-pass": 3 if updates == "simultaneous" else 5}[passes]
    with torch.compiler.set_stance("fail_on_recompile"):
        for step in steps:
            for _ in range(3):
                step(real.flip(0).contiguous(), -z, z)
    assert len(graphs) == made
    for a, b in zip(steps[0].parameters(), steps[1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
@pytest.mark.xdist_group("all cores")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own, of the textbook's G(z)
@pytest.mark.parametrize("passes", OBJECTIVES)
def test_compiled_gradients_are_the_textbooks(passes: str) -> None:
    real, z = _batch()
    k = torch.tensor(0.3)
    found = []
    for how, mode in ((passes, "default"), ("textbook", None)):
        nets = build(MODEL, seed=0)
        OBJECTIVES[how](*nets, k, compile_mode=mode).for_both(real, z, z)
        found.append([p.grad for net in nets for p in net.parameters() if p.grad is not None])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 1e-3 * want.norm()


@pytest.mark.slow
@pytest.mark.xdist_group("all cores")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")  # Dynamo's own, of the textbook's G(z)
@pytest.mark.parametrize("passes", ["textbook", "single-pass"])
def test_compiled_bf16_gradients_are_near_float32s(passes: str) -> None:
    """With channels enough for Inductor's tiles of 32x32, which a compiler broke where AVX-512 is."""
    real, z = _batch()
    k = torch.tensor(0.3)
    found = []
    for how, dtype, mode in ((passes, torch.bfloat16, "default"), ("textbook", None, None)):
        nets = build(replace(MODEL, filters=32), seed=0)
        for net in nets:
            net.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
        OBJECTIVES[how](*nets, k, dtype=dtype, compile_mode=mode).for_both(real, z, z)
        found.append([p.grad for net in nets for p in net.parameters() if p.grad is not None])
    for got, want in zip(*found, strict=True):
        assert (got - want).norm() <= 5e-2 * want.norm()


def test_a_step_goes_on_without_compilation_that_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no such compiler\nlong story")

    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda net, **_: compiled(net, backend=broken))
    step = TrainStep(*build(MODEL, seed=0), TRAIN, None, "default")
    plain = TrainStep(*build(MODEL, seed=0), TRAIN)
    real, z = _batch()
    with pytest.warns(UserWarning, match="torch.compile failed, going on without it"):
        step(real, z, z)
    for _ in range(2):
        plain(real, z, z)
    step(real, z, z)
    assert not step.objective.compiled
    assert all(torch.equal(a, b) for a, b in zip(step.parameters(), plain.parameters(), strict=True))


def test_when_to_compile(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setattr("shutil.which", lambda name: f"/bin/{name}")
    assert pick_compile("off", cpu, 1e9) == (None, "compile off")
    assert pick_compile("auto", cpu, 60) == (None, "compile off (a short run)")
    assert pick_compile("auto", cpu, 1e5) == ("default", "compile default")
    assert pick_compile("max-autotune", cpu, 1) == ("max-autotune", "compile max-autotune")
    monkeypatch.setattr("shutil.which", lambda name: None)
    mode, why = pick_compile("auto", cpu, 1e5)
    assert mode is None and "is missing" in why
    with pytest.raises(UserError, match=r"compile is 'default', but the compiler .* is missing; accepted here: auto"):
        pick_compile("default", cpu, 1e5)
