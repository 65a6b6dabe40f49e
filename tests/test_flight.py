"""NCCL's flight recorder is on for ranks, and kept where a rank was lost. No NCCL runs here: the record is empty."""

from __future__ import annotations

import json
import os
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from fastbegan.distributed import flight
from fastbegan.distributed.watch import LOST
from fastbegan.training import loop

VARIABLES = ("TORCH_FR_BUFFER_SIZE", "TORCH_NCCL_TRACE_BUFFER_SIZE")


def test_it_is_switched_on_unless_the_user_chose(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
    flight.switch_on()
    (name,) = (name for name in VARIABLES if name in os.environ)  # the other would only warn
    assert os.environ[name] == "2000"
    monkeypatch.setenv(name, "7")
    flight.switch_on()
    assert os.environ[name] == "7"


def _pretend_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    if not hasattr(flight._bindings(), "_dump_nccl_trace_json"):
        pytest.skip("this torch is built without NCCL")
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_backend_config", lambda: "cpu:gloo,cuda:nccl")


def test_a_lost_rank_leaves_the_records_of_the_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_nccl(monkeypatch)
    freed: list[int] = []
    for code in (0, LOST):
        loop._last_wish(tmp_path, 3, lambda: freed.append(1), code)
        assert (tmp_path / "flight-recorder").exists() == (code == LOST)
    assert "version" in json.loads((tmp_path / "flight-recorder" / "rank-3.json").read_text()) and len(freed) == 2


def test_a_device_that_hangs_does_not_keep_the_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _pretend_nccl(monkeypatch)
    hang = threading.Event()
    monkeypatch.setattr(flight, "_PATIENCE", 0.1)
    monkeypatch.setattr(flight._bindings(), "_dump_nccl_trace_json", lambda: hang.wait(60) and b"")
    begun = time.monotonic()
    flight.write_record(tmp_path / "records", 0)
    assert time.monotonic() - begun < 10 and not (tmp_path / "records").exists()
    hang.set()


def test_without_nccl_nothing_is_written(tmp_path: Path) -> None:
    flight.write_record(tmp_path / "records", 0)
    assert not (tmp_path / "records").exists()
