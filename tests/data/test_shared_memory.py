"""A /dev/shm that is too small for the processes of torch's DataLoader, as containers have it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

from fastbegan import TrainConfig
from fastbegan.data import files_loader
from fastbegan.data.choose import open_loader

pytestmark = pytest.mark.core


@pytest.mark.parametrize(
    "error",
    [
        "unable to write to file </torch_7_12_0>: No space left on device (28)",
        "unable to allocate shared memory(shm) for file </torch_7_12_0>: No space left on device (28)",
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
    ],
)
def test_a_small_shared_memory_is_named_once(
    pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: str
) -> None:
    here = os.getpid()

    def full(_: torch.Tensor) -> None:
        assert os.getpid() != here
        raise RuntimeError(error)

    monkeypatch.setattr(torch.Tensor, "share_memory_", full)  # the loader's processes are forked from this one
    monkeypatch.setattr(files_loader, "_SHARED_MEMORY", tmp_path)
    train = TrainConfig(data=str(pictures), batch_size=4, loader="torch")
    loader, *_ = open_loader(train, 16, torch.device("cpu"), lambda *_: None)
    with pytest.warns(UserWarning) as given:
        for position in range(0, 32, 4):
            assert loader.batch(position).isfinite().all()
    loader.close()
    (said,) = (str(warning.message) for warning in given)
    assert said.startswith(f"{tmp_path} is too small for loader processes (") and " MB, " in said and " free)" in said
    for advice in ("docker run --shm-size=1g", "--ipc=host", "--loader packed"):
        assert advice in said


def test_what_is_no_lack_of_room_is_not_called_so() -> None:
    for message in (
        "unable to open shared memory object </torch_1_2_3> in read-write mode: Too many open files (24)",
        "unable to open shared memory object </torch_1_2_3> in read-write mode: Permission denied (13)",
        "DataLoader worker (pid 7) is killed by signal: Killed",
    ):
        assert files_loader._lack_of_memory(message) is None
