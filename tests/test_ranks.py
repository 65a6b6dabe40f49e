"""Several ranks on one machine: the same step as one rank, and every fault ends as it should."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from fastbegan.distributed.ranks import _roll_call
from fastbegan.distributed.stop import StopRequest
from fastbegan.measure.plan import all_reduce_seconds
from fastbegan.runs.checkpoint import list_checkpoints
from fastbegan.runs.folder import RunFolder
from tests.helpers.processes import ROOT, environment
from tests.helpers.two_nodes import NOT_HERE

Start = Callable[..., "subprocess.Popen[str]"]
Run = Callable[..., "subprocess.CompletedProcess[str]"]

FLAGS = (
    "--filters 4 --data faces:64 --batch-size 16 --lr 1e-4 --lr-fall 0 --lambda-k 1e-3 --device cpu "
    "--precision float32 --log-every 5 --sample-every 1000 --checkpoint-every 10 --compile off"
).split()


@pytest.fixture
def torchrun() -> Iterator[Start]:
    """Start so many ranks, with a fault as `tests/helpers/faulty.py` takes it or without one; returns at once."""
    started = []

    def start(ranks: int, *arguments: object, fault: str = "", restarts: int = 0) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--max-restarts", str(restarts)]
        program = [str(ROOT / "tests" / "helpers" / "faulty.py"), *fault.split()] if fault else ["-m", "fastbegan"]
        command += ["--nproc-per-node", str(ranks), *program, "train", *map(str, arguments)]
        process = subprocess.Popen(
            command,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()


def _finish(process: subprocess.Popen[str], seconds: float = 500) -> str:
    output = process.communicate(timeout=seconds)[0]
    assert process.returncode == 0, output
    return output


def _state(out: Path) -> dict[str, Any]:
    return torch.load(list_checkpoints(out / "checkpoints")[-1] / "state.pt", weights_only=True)


def _check_near(out: Path, other: Path, bound: float = 1e-5) -> None:
    """The nets of two runs differ by less than `bound`, in the relative norm of each tensor."""
    one, two = (_state(folder)["modules"] for folder in (out, other))
    found = {
        name: ((one[name] - two[name]).norm() / one[name].norm()).item()
        for name in one
        if name.split(".")[0] in ("generator", "discriminator", "average") and one[name].norm() > 0
    }
    worst = max(found, key=lambda name: found[name])
    assert found[worst] < bound, (other.name, worst, found[worst])
    assert abs(one["equilibrium.k"] - two["equilibrium.k"]) < 1e-7


def _errors(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("error: ")]


def _wait_for(condition: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    until = time.monotonic() + 400
    while not condition():
        if process.poll() is not None or time.monotonic() > until:
            process.terminate()  # torchrun ends its ranks, which are in sessions of their own
            pytest.fail(process.communicate(timeout=500)[0])
        time.sleep(0.05)


def _ranks_of(run: subprocess.Popen[str]) -> dict[str, int]:
    """The processes of torchrun's ranks."""
    children = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    return {
        value.partition("=")[2]: int(child)
        for child in children
        for value in Path(f"/proc/{child}/environ").read_text().split("\0")
        if value.startswith("RANK=")
    }


@pytest.mark.slow
def test_two_and_four_ranks_do_what_one_does(tmp_path: Path, torchrun: Start) -> None:
    for ranks in (1, 2, 4):
        output = _finish(torchrun(ranks, *FLAGS, "--steps", 50, "--out", tmp_path / f"{ranks}"))
        assert ranks == 1 or f"{ranks} ranks of {16 // ranks} images a step" in output
        assert output.count("done after 50 steps, 800 images") == 1  # one speaks for all
    _check_near(tmp_path / "1", tmp_path / "2")
    _check_near(tmp_path / "1", tmp_path / "4")


@pytest.mark.slow
def test_a_run_goes_on_with_fewer_and_more_ranks(tmp_path: Path, torchrun: Start) -> None:
    _finish(torchrun(1, *FLAGS, "--steps", 30, "--out", tmp_path / "whole"))
    _finish(torchrun(2, *FLAGS, "--steps", 15, "--out", tmp_path / "1"))
    shutil.copytree(tmp_path / "1", tmp_path / "4")
    for ranks in (1, 4):
        output = _finish(torchrun(ranks, "--steps", 30, "--out", tmp_path / f"{ranks}"))
        assert "continued at step 15" in output
        _check_near(tmp_path / "whole", tmp_path / f"{ranks}")


@pytest.mark.slow
@pytest.mark.parametrize("restarts", [pytest.param(0, marks=pytest.mark.core), 1])
def test_a_rank_that_dies(tmp_path: Path, torchrun: Start, restarts: int) -> None:
    out = tmp_path / "run"
    run = torchrun(2, *FLAGS, "--steps", 25, "--out", out, fault="collect 30 kill 1", restarts=restarts)
    output = run.communicate(timeout=500)[0]
    if restarts:
        assert run.returncode == 0 and "continued at step 10" in output, output
        return
    assert run.returncode != 0
    assert [re.sub(r"\(.*?\)", "()", line) for line in _errors(output)] == [
        "error: rank 1 (): no sign of life for 6 seconds, at step 15"
    ], output
    assert _state(out)["step"] == 10


@pytest.mark.slow
def test_a_rank_that_dies_while_it_starts(tmp_path: Path, torchrun: Start) -> None:
    """The other one waits for it; or loads, and hears torchrun's SIGTERM there."""
    run = torchrun(2, *FLAGS, "--steps", 25, "--out", tmp_path / "a", fault="load 1 kill 1")
    output = run.communicate(timeout=500)[0]
    (message,) = _errors(output)
    assert message.startswith("error: rank 1 (on ") and "no sign of life for 6 seconds" in message
    assert "KeyboardInterrupt" not in output and "interrupted" not in output
    out = tmp_path / "b"
    run = torchrun(2, *FLAGS, "--steps", 25, "--out", out, fault=f"load 1 hang:{tmp_path / 'here'} 0")
    _wait_for((tmp_path / "here").exists, run)
    os.kill(_ranks_of(run)["1"], signal.SIGKILL)
    output = run.communicate(timeout=500)[0]
    (message,) = _errors(output)
    assert message.startswith("error: rank 1 (on ") and "no sign of life for 20 seconds" in message
    assert "KeyboardInterrupt" not in output and "interrupted" not in output


@pytest.mark.slow
def test_a_rank_that_dies_before_the_first_checkpoint(tmp_path: Path, torchrun: Start) -> None:
    out = tmp_path / "run"
    output = _finish(torchrun(2, *FLAGS, "--steps", 12, "--out", out, fault="collect 4 kill 1", restarts=1))
    assert "continued" not in output and _state(out)["step"] == 12


@pytest.mark.slow
@pytest.mark.parametrize("place", ["prepare 12", "collect 23"])
def test_a_rank_that_hangs(tmp_path: Path, torchrun: Start, place: str) -> None:
    run = torchrun(2, *FLAGS, "--steps", 1000, "--rank-timeout", 5, "--out", tmp_path / "run", fault=f"{place} hang 1")
    output = run.communicate(timeout=500)[0]
    assert run.returncode != 0
    (message,) = _errors(output)
    assert message.startswith("error: rank 1 (on ") and "kept the others waiting for 5 seconds" in message


@pytest.mark.slow
def test_a_hang_in_the_first_rank_is_its_own(tmp_path: Path, torchrun: Start) -> None:
    run = torchrun(
        2, *FLAGS, "--steps", 1000, "--rank-timeout", 5, "--out", tmp_path / "run", fault="prepare 12 hang 0"
    )
    output = run.communicate(timeout=500)[0]
    (message,) = _errors(output)
    assert run.returncode != 0 and message.startswith("error: rank 0 (on ") and "waiting for 5 seconds" in message


@pytest.mark.slow
def test_nan_in_one_rank_stops_all_before_any_weight_changes(tmp_path: Path, torchrun: Start) -> None:
    out = tmp_path / "run"
    run = torchrun(2, *FLAGS, "--steps", 40, "--out", out, fault="step 17 nan 1")
    output = run.communicate(timeout=500)[0]
    assert run.returncode != 0 and "error: step 17 gave a loss, gradient or k that is not finite" in output, output
    assert output.count("is not finite") == 1 and "exitcode  : 3" in output
    dump = json.loads((out / "nonfinite.json").read_text())
    assert dump["step"] == 17 and len(dump["image_ids"]) == 16
    assert _state(out)["step"] == 10


@pytest.mark.slow
@pytest.mark.parametrize(("step", "noticed", "saved"), [(1, 1, 0), (17, 20, 10)])
def test_ranks_that_drift_apart_save_nothing(
    tmp_path: Path, torchrun: Start, step: int, noticed: int, saved: int
) -> None:
    run = torchrun(2, *FLAGS, "--steps", 40, "--out", tmp_path / "run", fault=f"step {step} drift 1")
    output = run.communicate(timeout=500)[0]
    (message,) = _errors(output)
    assert run.returncode != 0 and f"step {noticed}: the weights of rank 1 are no longer those of rank 0" in message
    found = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert [int(one.name) for one in found] == [saved][: bool(saved)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_to_any_rank_stops_all_at_one_step(tmp_path: Path, torchrun: Start, number: signal.Signals) -> None:
    out = tmp_path / "run"
    run = torchrun(2, *FLAGS, "--steps", 100_000, "--out", out)
    _wait_for((out / "checkpoints" / "000000010").exists, run)
    os.kill(_ranks_of(run)["1"], number)
    output = run.communicate(timeout=500)[0]
    assert run.returncode == 0, output
    state = _state(out)
    assert f"stopped after {state['step']:,} steps" in output and not _errors(output)
    assert RunFolder(out).read_metrics()[-1]["step"] == state["step"]


@pytest.mark.slow
def test_what_goes_wrong_in_one_rank_is_told_with_its_cause(tmp_path: Path, torchrun: Start) -> None:
    run = torchrun(2, *FLAGS, "--steps", 40, "--out", tmp_path / "run", fault="collect 30 raise 1")
    output = run.communicate(timeout=500)[0]
    assert run.returncode != 0 and _errors(output) == ["error: rank 1 ended: ValueError planted"], output
    assert "in faulty" in output  # the trace of it
    run = torchrun(2, *FLAGS, "--steps", 40, "--out", tmp_path / "lost", fault="land 30 lose 1")
    output = run.communicate(timeout=500)[0]
    assert run.returncode != 0 and len(_errors(output)) == 1, output
    assert "the ranks lost contact; rank 1: no space left in /dev/shm" in _errors(output)[0]


@pytest.mark.slow
def test_one_rank_hears_a_signal_and_its_echo(tmp_path: Path, torchrun: Start) -> None:
    """A scheduler tells the whole process group, and torchrun tells its rank once more."""
    out = tmp_path / "run"
    run = torchrun(1, *FLAGS, "--steps", 100_000, "--out", out)
    _wait_for((out / "checkpoints" / "000000010").exists, run)
    (child,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    for _ in range(2):
        os.kill(int(child), signal.SIGTERM)
        time.sleep(0.05)
    output = _finish(run)
    assert f"stopped after {_state(out)['step']:,} steps" in output


@pytest.mark.slow
def test_a_full_disk_ends_all_with_one_message(tmp_path: Path, torchrun: Start) -> None:
    out = tmp_path / "run"
    run = torchrun(2, *FLAGS, "--steps", 1000, "--out", out, fault="save 2 full 0")
    output = run.communicate(timeout=500)[0]
    (message,) = _errors(output)
    assert run.returncode != 0 and "cannot be written (No space left on device); earlier ones are kept" in message
    assert _state(out)["step"] == 10


@pytest.mark.slow
def test_bad_input_is_said_once(tmp_path: Path, torchrun: Start) -> None:
    for flags, message in (
        (("--batch-size", 15, "--out", tmp_path / "a"), "batch_size is 15; accepted: multiples of 2 ranks"),
        (("--data", tmp_path / "none", "--out", tmp_path / "b"), "none"),
        ((), "--out is missing"),
        (("--requeue-code", 75, "--out", tmp_path / "d"), "requeue_code is 75; accepted: 0 under torchrun"),
        (("--batch-size", "x", "--out", tmp_path / "c"), "invalid literal"),
        (("--out", tmp_path / "e"), f"{tmp_path / 'e'} is in use by process {os.getpid()} on "),
    ):
        with RunFolder(tmp_path / "e").reserved():
            run = torchrun(2, *FLAGS, "--steps", 5, *flags)
            output = run.communicate(timeout=500)[0]
        assert run.returncode != 0 and "Traceback" not in output.partition("torch/distributed")[0], output
        assert sum(message in line for line in output.splitlines()) == 1, output
        assert "exitcode  : 2" in output and "interrupted" not in output
        assert not list(tmp_path.iterdir())  # no folder with nothing in it but a lock


@pytest.mark.slow
def test_a_start_that_another_rank_refuses_leaves_no_folder(tmp_path: Path, torchrun: Start) -> None:
    run = torchrun(2, *FLAGS, "--steps", 40, "--out", tmp_path / "run", fault="load 1 raise 1")
    output = run.communicate(timeout=500)[0]
    assert run.returncode != 0 and _errors(output) == ["error: rank 1 ended: ValueError planted"], output
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_rank_that_writes_dies_and_starts_again(tmp_path: Path, torchrun: Start) -> None:
    """It held the lock of the run folder."""
    out = tmp_path / "run"
    run = torchrun(2, *FLAGS, "--steps", 25, "--out", out, fault="collect 30 kill 0", restarts=1)
    output = run.communicate(timeout=500)[0]
    assert run.returncode == 0 and "continued at step 10" in output and "in use" not in output, output
    steps = [row["step"] for row in RunFolder(out).read_metrics()]
    assert steps == sorted(set(steps)) and steps[-1] == 25


@pytest.mark.core
def test_of_several_ranks_only_an_interrupt_ends_a_start() -> None:
    with StopRequest(ranks=True) as stop:
        signal.raise_signal(signal.SIGTERM)  # torchrun's, since another rank died: it has yet to be named
        assert stop.signal == signal.SIGTERM
        stop.ignore()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
    with StopRequest(ranks=True), pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)


@pytest.mark.core
def test_ranks_that_start_again_do_not_take_what_was_left_for_their_own() -> None:
    """Two generations of three ranks in one store, with the hello of a rank that ended at once between them."""
    server = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    stores = [dist.TCPStore("localhost", server.port, is_master=False) for _ in range(3)]
    found = []
    for _ in range(2):
        with ThreadPoolExecutor(3) as pool:
            names = set(pool.map(_roll_call, stores, range(3), [3] * 3))
        assert len(names) == 1
        found.append(names.pop())
        server.set("fastbegan/hello 1", "nobody")  # who ended at once
    assert found[0] != found[1]


THIRTY_FIVE = [*FLAGS, "--steps", "35", "--checkpoint-every", "5", "--deterministic"]
# with the step of the checkpoint that must be there afterwards
POINTS = {
    "config 1": 0, "config+ 1": 0,
    "step 1": 0, "step 14": 5, "step+ 10": 0, "metrics 2": 0, "sheet 1": 0, "copy 1": 0, "copy 2": 0, "weights 1": 0,
    "weights 2": 5, "save 1": 0, "save 2": 5, "save+ 2": 5, "fsync 5": 0, "fsync 6": 0, "sum 2": 5, "manifest 2": 5,
    "rename 1": 0, "rename 2": 5, "rename+ 2": 10, "sync 1": 0, "sync 3": 10, "purge 1": 15,
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_killed_at_any_point_and_continued(tmp_path: Path, whole: Path, fastbegan: Run, point: str) -> None:
    out = tmp_path / "run"
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "faulty.py"), *point.split(), "kill", "0", "train"]
    killed = subprocess.run(
        [*command, *THIRTY_FIVE, "--out", str(out)], env=environment(), capture_output=True, text=True, check=False
    )
    assert killed.returncode == -signal.SIGKILL, killed.stdout + killed.stderr
    reached = max((int(found.name) for found in list_checkpoints(out / "checkpoints")), default=0)
    assert reached >= POINTS[point]
    again = fastbegan("train", *THIRTY_FIVE, "--out", out)
    assert again.returncode == 0, again.stderr
    assert (f"continued at step {reached}\n" in again.stdout) == (reached > 0)
    one, two = ({**_state(folder), "seconds": 0.0} for folder in (whole, out))
    assert str(_plain(one)) == str(_plain(two)), reached


def _plain(value: Any) -> Any:
    """Tensors as digests of their bytes."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_plain(one) for one in value]
    return hashlib.sha256(value.numpy().tobytes()).hexdigest() if isinstance(value, torch.Tensor) else value


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nothing happened to."""
    out = tmp_path_factory.mktemp("whole") / "run"
    command = [sys.executable, "-m", "fastbegan", "train", *THIRTY_FIVE, "--out", str(out)]
    subprocess.run(command, env=environment(), capture_output=True, check=True)
    return out


@pytest.mark.core
def test_there_are_twenty_points() -> None:
    assert len(POINTS) >= 20


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_the_communication_model_fits_what_gloo_takes(ranks: int) -> None:
    """Latency and bandwidth from the smallest and the largest sum; the model then gives those between."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command.append(str(ROOT / "tests" / "helpers" / "gloo_times.py"))
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=200, check=True)
    found = {int(size): seconds for size, seconds in json.loads(done.stdout.splitlines()[-1]).items()}
    small, large = min(found), max(found)
    latency = found[small] / (2 * (ranks - 1))
    bandwidth = 2 * (ranks - 1) / ranks * (large - small) / (found[large] - found[small])
    modelled = {size: all_reduce_seconds(size, ranks, bandwidth, latency) for size in found}
    print(f"{ranks} gloo ranks: {1e6 * latency:.0f} us, {bandwidth / 1e9:.2f} GB/s")
    for size, seconds in found.items():
        print(f"{size:>10,} B: {1e3 * seconds:8.3f} ms, modelled {1e3 * modelled[size]:8.3f}")
        assert 0.4 < modelled[size] / seconds < 2.5, (size, found, modelled)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_machines_one_of_which_is_cut_off(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "tests" / "helpers" / "two_nodes.py"), str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=850, check=False)
    if done.returncode == NOT_HERE:
        pytest.skip(done.stdout.strip())
    logs = "".join(path.read_text() for path in tmp_path.glob("*.log"))
    assert done.returncode == 0, done.stdout + done.stderr + logs[-6000:]
    assert "cut off after a checkpoint of step" in done.stdout
