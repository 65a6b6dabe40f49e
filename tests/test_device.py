"""A GPU that cannot be used is named with what to do; the CPU goes on."""

from __future__ import annotations

import pytest
import torch

from fastbegan import UserError, device
from fastbegan.device import pick_device, pick_precision


@pytest.fixture
def old_card(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine whose driver sees a P100 that this torch has no code for."""

    def no_kernel(*_: object, **__: object) -> None:
        raise RuntimeError("CUDA error: no kernel image is available for execution on the device\nCompile with ...")

    monkeypatch.setattr(torch, "__version__", "2.15.0+cu130")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch, "arange", no_kernel)
    monkeypatch.setattr(device, "nvidia_smi", lambda: ("Tesla P100-SXM2-16GB", "535.104.05"))


def test_auto_goes_on_with_the_cpu_and_says_why(old_card: None) -> None:
    chosen, line = pick_device("auto")
    assert chosen.type == "cpu"
    assert "Tesla P100-SXM2-16GB with driver 535.104.05" in line
    assert "no kernel image" in line and "make venv TORCH=2.7.1" in line
    assert "\n" not in line


def test_a_card_asked_for_by_name_is_an_error(old_card: None) -> None:
    with pytest.raises(UserError, match="device 'cuda:0' does not work: Tesla P100"):
        pick_device("cuda:0")
    with pytest.raises(UserError, match="there is no GPU of that number, 1 in all"):
        pick_device("cuda:9")


def test_old_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.15.0+cu130")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "nvidia_smi", lambda: ("NVIDIA A100", "470.82.01"))
    _, line = pick_device("auto")
    assert "NVIDIA A100 with driver 470.82.01 does not run torch" in line and "TORCH=2.7.1" in line
    monkeypatch.setattr(torch, "__version__", "2.7.1+cu126")
    assert pick_device("auto")[1].endswith("update the driver)")


def test_no_card_is_no_news(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(device, "nvidia_smi", lambda: None)
    chosen, line = pick_device("auto")
    assert chosen.type == "cpu" and line.endswith("threads")
    with pytest.raises(UserError, match="device 'cuda' does not work: torch sees no GPU here"):
        pick_device("cuda")
    with pytest.raises(UserError, match="device is 'gpu'; accepted: auto, cpu, cuda, cuda:N"):
        pick_device("gpu")


def test_precision_on_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    monkeypatch.setattr(device, "_cpu_flags", lambda: ["fpu", "avx2"])
    assert pick_precision("auto", cpu) == ("float32", None)
    monkeypatch.setattr(device, "_cpu_flags", lambda: ["fpu", "avx512_bf16"])
    assert pick_precision("auto", cpu) == ("bf16", torch.bfloat16)
    assert pick_precision("float32", cpu) == ("float32", None)
    for name in ("tf32", "fp16"):
        with pytest.raises(UserError, match=f"precision '{name}' needs"):
            pick_precision(name, cpu)
