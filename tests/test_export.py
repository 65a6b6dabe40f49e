"""What `fastbegan export` writes runs elsewhere and computes the same."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from fastbegan import ModelConfig, TrainConfig, UserError
from fastbegan.cli import main
from fastbegan.commands import export as export_module
from fastbegan.commands.export import Export, Format
from fastbegan.nets.models import build, to_plain
from fastbegan.runs.folder import RunConfig, RunFolder

SKIPS = ModelConfig(size=32, filters=4, hidden=6, latent=5)
FADING = ModelConfig(size=16, filters=4, hidden=6, latent=5, widths=(1, 2), skips=False, vanishing=True)
CONFIGS = [pytest.param(SKIPS, id="skips"), pytest.param(FADING, id="fading", marks=pytest.mark.slow)]


def _run(path: Path, config: ModelConfig) -> dict[str, nn.Module]:
    """Make the folder of a run; its nets as ordinary modules, by the names of their files."""
    generator, discriminator = build(config, seed=0)
    for name, buffer in (*generator.named_buffers(), *discriminator.named_buffers()):
        assert name.endswith("carry")
        buffer.fill_(0.3)
    path.mkdir()
    RunFolder(path).write_config(RunConfig("demo", config, TrainConfig(steps=1)))
    nets = {"average": generator, "discriminator": discriminator}
    RunFolder(path).write_weights({f"{n}.{key}": v for n, net in nets.items() for key, v in net.state_dict().items()})
    return {"generator": to_plain(generator).eval(), "discriminator": to_plain(discriminator).eval()}


def _inputs(config: ModelConfig) -> dict[str, list[Tensor]]:
    generator = torch.Generator().manual_seed(3)
    shapes = {"generator": (config.latent,), "discriminator": (3, config.size, config.size)}
    return {n: [torch.rand(b, *shape, generator=generator) * 2 - 1 for b in (1, 5)] for n, shape in shapes.items()}


def _compare(call: Callable[[Tensor], Tensor], net: nn.Module, inputs: list[Tensor], most: float) -> None:
    with torch.no_grad():
        for x in inputs:
            torch.testing.assert_close(call(x), net(x), rtol=0, atol=most)


ELSEWHERE = """
import sys, typing
for name in ("fastbegan", "fastbegan_kernels", "safetensors", "safetensors.torch"):
    sys.modules[name] = None  # importing it fails
sys.path.insert(0, sys.argv[1])
import torch
from model import load
inputs = torch.load(sys.argv[2], weights_only=True)
hints = typing.get_type_hints(sys.modules[load.__module__].ModelConfig)  # every name in it is defined
assert hints["filters"] is int and hints["widths"] == tuple[int, ...] | None
with torch.no_grad():
    torch.save({name: [load(name)(x) for x in batches] for name, batches in inputs.items()}, sys.argv[3])
"""


@pytest.mark.parametrize("config", CONFIGS)
def test_plain_needs_torch_only(config: ModelConfig, tmp_path: Path) -> None:
    nets, inputs = _run(tmp_path / "run", config), _inputs(config)
    assert main(["export", str(tmp_path / "run"), "--format", "plain", "--out", str(tmp_path / "out")]) == 0
    torch.save(inputs, tmp_path / "inputs.pt")
    arguments = [str(tmp_path / name) for name in ("out", "inputs.pt", "outputs.pt")]
    done = subprocess.run(
        [sys.executable, "-c", ELSEWHERE, *arguments],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    outputs = torch.load(tmp_path / "outputs.pt", weights_only=True)
    for name, net in nets.items():
        found = iter(outputs[name])
        _compare(lambda _, found=found: next(found), net, inputs[name], 1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_pt2_takes_any_batch(config: ModelConfig, tmp_path: Path) -> None:
    nets, inputs = _run(tmp_path / "run", config), _inputs(config)
    assert main(["export", str(tmp_path / "run"), "--format", "pt2"]) == 0
    for name, net in nets.items():
        loaded = torch.export.load(tmp_path / "run" / "export" / f"{name}.pt2").module()
        _compare(loaded, net, inputs[name], 1e-6)


@pytest.mark.parametrize("config", CONFIGS)
def test_onnx_takes_any_batch(config: ModelConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    onnxruntime = pytest.importorskip("onnxruntime")
    nets, inputs = _run(tmp_path / "run", config), _inputs(config)
    assert main(["export", str(tmp_path / "run"), "--format", "onnx"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[:2] == [str(tmp_path / "run" / "export" / f"{name}.onnx") for name in nets]
    assert printed[2].startswith("checked: generator run by onnxruntime ")
    assert printed[3].startswith("checked: discriminator run by onnxruntime ") and len(printed) == 4
    names = {"generator": ("z", "images"), "discriminator": ("images", "reconstruction")}
    for name, net in nets.items():
        session = onnxruntime.InferenceSession(tmp_path / "run" / "export" / f"{name}.onnx")
        entry, result = names[name]
        assert session.get_outputs()[0].shape == ["batch", 3, config.size, config.size]
        _compare(
            lambda x, s=session, e=entry, r=result: torch.as_tensor(s.run([r], {e: x.numpy()})[0]),
            net,
            inputs[name],
            1e-4,
        )


@pytest.mark.parametrize("noise", [2e-6, torch.nan])
def test_what_differs_is_not_written(noise: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(tmp_path / "run", SKIPS)
    read = export_module._READERS["plain"]

    def disturbed(folder: Path, stem: str) -> tuple[Callable[[Tensor], Tensor], str]:
        call, reader = read(folder, stem)
        return lambda x: call(x) + (noise if len(x) == 5 and stem == "discriminator" else 0.0), reader

    monkeypatch.setitem(export_module._READERS, "plain", disturbed)
    out = tmp_path / "out"
    with pytest.raises(UserError, match=r"discriminator as plain, run by model.py, differs .* accepted: at most 1e-06"):
        Export(tmp_path / "run", "plain", out=out).run()
    assert not list(out.iterdir())
    assert Export(tmp_path / "run", "plain", out=out, check="off").run() == 0
    assert len(list(out.iterdir())) == 4


def test_missing_packages_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _run(tmp_path / "run", SKIPS)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"needs onnxruntime; pip install 'fastbegan\[export\]', or take --check off"):
        Export(tmp_path / "run", "onnx").run()
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(UserError, match=r"format 'onnx' needs onnxscript; pip install 'fastbegan\[export\]'$"):
        Export(tmp_path / "run", "onnx", check="off").run()
    assert not (tmp_path / "run" / "export").exists()


def test_onnx_without_a_check_needs_no_onnxruntime(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("onnxscript")
    _run(tmp_path / "run", FADING)
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    assert main(["export", str(tmp_path / "run"), "--format", "onnx", "--net", "autoencoder", "--check", "off"]) == 0
    assert [path.name for path in (tmp_path / "run" / "export").iterdir()] == ["discriminator.onnx"]
    assert capsys.readouterr().out.splitlines()[1:] == ["not checked"]


def test_nothing_of_others_is_overwritten(tmp_path: Path) -> None:
    _run(tmp_path / "run", SKIPS)
    before = (tmp_path / "run" / "config.json").read_bytes()
    with pytest.raises(UserError, match="belongs to something else; give another --out"):
        Export(tmp_path / "run", "plain", out=tmp_path / "run").run()
    assert (tmp_path / "run" / "config.json").read_bytes() == before
    for _ in range(2):  # what is its own may be written again
        assert Export(tmp_path / "run", "plain", net="generator").run() == 0
    assert not (tmp_path / "run" / "export" / "discriminator.safetensors").exists()


@pytest.mark.parametrize("format", ["onnx", "pt2", "plain"])
def test_weights_that_do_not_fit_are_refused(format: Format, tmp_path: Path) -> None:
    _run(tmp_path / "run", SKIPS)
    run = RunFolder(tmp_path / "run")
    run.write_config(RunConfig("demo", replace(SKIPS, filters=5), TrainConfig(steps=1)))
    with pytest.raises(UserError, match=r"discriminator\.safetensors does not fit .*config\.json"):
        Export(run.path, format, net="autoencoder").run()
    run.generator_file.unlink()
    with pytest.raises(UserError, match=r"generator\.safetensors does not exist; train until the first checkpoint"):
        Export(run.path, format).run()
    assert not (run.path / "export").exists()


def test_wrong_options_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="format is 'tf'; accepted: onnx, pt2, plain"):
        Export(tmp_path, "tf").run()  # pyright: ignore[reportArgumentType]
    with pytest.raises(UserError, match="net is 'encoder'; accepted: generator, autoencoder, both"):
        Export(tmp_path, "plain", net="encoder").run()  # pyright: ignore[reportArgumentType]


def test_the_config_of_plain_is_the_whole_config(tmp_path: Path) -> None:
    _run(tmp_path / "run", FADING)
    Export(tmp_path / "run", "plain", net="generator").run()
    stored = json.loads((tmp_path / "run" / "export" / "config.json").read_text())
    assert ModelConfig(**stored) == FADING
