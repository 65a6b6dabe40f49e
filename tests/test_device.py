"""A GPU that cannot be used is named with what to do; the CPU goes on."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import pytest
import torch

from fastbegan import ModelConfig, TrainConfig, UserError, device
from fastbegan.device import pick_device, pick_precision, set_backends
from fastbegan.training import tune

pytestmark = pytest.mark.core


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


def test_a_good_card_is_not_judged_by_an_old_one_beside_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch warns of each card that it has no code for; the tiny kernel runs all the same."""

    def available() -> bool:
        warnings.warn("Found GPU1 Quadro K620 which is of compute capability (CC) 5.0", stacklevel=2)
        return True

    monkeypatch.setattr(torch.cuda, "is_available", available)
    for name, value in {"device_count": 2, "current_device": 0, "get_device_name": "NVIDIA A100"}.items():
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    arange = torch.arange
    monkeypatch.setattr(torch, "arange", lambda *sizes, device, **options: arange(*sizes, **options))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for wanted in ("auto", "cuda"):
            assert pick_device(wanted) == (torch.device("cuda", 0), "cuda:0, NVIDIA A100")  # with its number, for DALI


def test_a_slice_of_a_gpu_is_chosen_elsewhere() -> None:
    with pytest.raises(UserError, match=r"device is 'MIG-8b8c'; accepted: .* slice by CUDA_VISIBLE_DEVICES=MIG-"):
        pick_device("MIG-8b8c")


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
    monkeypatch.setattr(device, "_cpu_flags", lambda: ["fpu", "avx512_bf16"])
    assert device.has_native_bf16(cpu) and pick_precision("auto", cpu) == ("float32", None)  # only a run measures
    monkeypatch.setattr(device, "_cpu_flags", lambda: ["fpu", "avx2"])
    assert not device.has_native_bf16(cpu)
    assert pick_precision("float32", cpu) == ("float32", None)
    for name in ("tf32", "fp16"):
        with pytest.raises(UserError, match=f"precision '{name}' needs"):
            pick_precision(name, cpu)


@pytest.mark.parametrize(("capability", "accepted"), [((6, 0), "float32, fp16"), ((7, 0), "float32, fp16")])
def test_precision_on_old_gpus(capability: tuple[int, int], accepted: str, monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert pick_precision("auto", gpu) == ("float32", None) and pick_precision("fp16", gpu)[1] == torch.float16
    with pytest.raises(UserError, match=f"needs an NVIDIA GPU from Ampere on; cuda:0 accepts {accepted}$"):
        pick_precision("tf32", gpu)


@pytest.fixture
def _own_backends() -> Iterator[None]:
    """Flags of the whole process, put back."""
    cudnn = torch.backends.cudnn
    before = cudnn.benchmark, cudnn.allow_tf32, torch.get_float32_matmul_precision()
    yield
    torch.use_deterministic_algorithms(False)
    if hasattr(torch.backends, "fp32_precision"):
        torch.backends.fp32_precision = "none"  # pyright: ignore
    cudnn.benchmark, cudnn.allow_tf32 = before[:2]
    torch.set_float32_matmul_precision(before[2])


@pytest.mark.usefixtures("_own_backends")
def test_one_function_sets_torchs_libraries(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    cudnn = torch.backends.cudnn
    set_backends("float32")
    assert cudnn.benchmark and not cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "highest"
    set_backends("tf32", search=False)
    assert not cudnn.benchmark and cudnn.allow_tf32 and torch.get_float32_matmul_precision() == "high"
    set_backends("bf16", deterministic=True)
    assert not cudnn.benchmark and torch.are_deterministic_algorithms_enabled()


@pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="before torch 2.9")
@pytest.mark.usefixtures("_own_backends")
def test_tf32_of_the_newer_switches_does_not_outlive_float32() -> None:
    torch.backends.fp32_precision = "tf32"  # pyright: ignore
    set_backends("float32")
    assert torch.backends.cudnn.conv.fp32_precision == "ieee"  # pyright: ignore
    assert torch.backends.cuda.matmul.fp32_precision == "ieee" and not torch.backends.cudnn.allow_tf32
    set_backends("tf32")
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"  # pyright: ignore


@pytest.mark.usefixtures("_own_backends")
def test_what_only_looks_leaves_the_search_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that sees what kernels are asked for may not fit; the run, which needs less, keeps its settings."""
    seen: list[bool] = []

    def full(*_: object) -> None:
        seen.append(torch.backends.cudnn.benchmark)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(tune, "_run_once", full)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    set_backends("float32")
    with pytest.warns(
        UserWarning, match="kernels could not be chosen beforehand: OutOfMemoryError: CUDA out of memory"
    ):
        assert tune.tune(ModelConfig(size=32), TrainConfig(), torch.device("cuda", 0), None) == 1
    assert seen == [False] and torch.backends.cudnn.benchmark
