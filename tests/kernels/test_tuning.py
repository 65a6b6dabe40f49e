"""The choice of kernels: wrong ones are dropped, the fastest runs, and a crash ends a child process only.

The machinery is the same on a CPU, where kernels are interpreted and times are the host's.
"""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

from fastbegan_kernels import cache, child, clock, conv_layer, problems, tuning
from fastbegan_kernels.child import Trial
from fastbegan_kernels.conv_layer import EPILOGUE, Layer
from fastbegan_kernels.fused.conv_tiles import FULL
from fastbegan_kernels.problems import FUSED, PLAIN, Form, Named, Pointwise
from fastbegan_kernels.replacement import Replacement
from tests.helpers.oracle import DEVICE

pytest.importorskip("triton")
PROBLEM = Layer("same", False, "float32", (2, 16, 6, 6), (16, 16, 3, 3))
FORMS: list[Form] = [FULL[-1], EPILOGUE]


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("FASTBEGAN_CACHE", str(tmp_path))
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "_adopted", {})
    monkeypatch.setattr(tuning, "_warned", set())
    monkeypatch.setattr(tuning, "_no_child", set())
    monkeypatch.setattr(tuning, "_passing", set())
    monkeypatch.setattr(cache, "_here", {})
    yield
    child.close()


@pytest.fixture
def _trusting(monkeypatch: pytest.MonkeyPatch) -> None:
    """No child processes: every form counts as having run."""
    monkeypatch.setattr(tuning, "survivors", lambda problem, device, hows, **_: dict.fromkeys(hows, Trial(None)))


def _patched(monkeypatch: pytest.MonkeyPatch, form: Form, change: Callable[[Tensor], Tensor]) -> None:
    """Pass the outputs of a form through `change`."""
    forward = conv_layer._forward

    def changed(chosen: Form, *arguments: Any) -> Tensor:
        result = forward(chosen, *arguments)
        return change(result) if chosen == form else result

    monkeypatch.setattr(conv_layer, "_forward", changed)


class _Clock:
    """A clock that advances in `slow` only: real times would depend on the machine's load."""

    now = 0.0

    def seconds(self, run: Callable[[int], object], device: torch.device, first: int) -> float:
        before = self.now
        run(first)
        return self.now - before

    def slow(self, result: Tensor) -> Tensor:
        self.now += 1
        return result


@pytest.mark.usefixtures("_trusting")
@pytest.mark.parametrize("slow", FORMS)
def test_the_fastest_right_form_is_chosen_and_kept(slow: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    hands = _Clock()
    monkeypatch.setattr(clock, "_seconds", hands.seconds)
    _patched(monkeypatch, slow, hands.slow)
    (fast,) = (form for form in FORMS if form != slow)
    assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == fast
    monkeypatch.setattr(tuning, "outcomes", _unwanted)
    monkeypatch.setattr(tuning, "_chosen", {})
    assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == fast  # from the disk
    kept = cache.read(DEVICE)
    assert kept["choices"] == {f"{PROBLEM!r} auto": fast.name}
    times = kept["times"][f"{PROBLEM!r} auto"]
    assert times == {slow.name: [1.0, 0.0], fast.name: [0.0, 0.0]}


def _unwanted(*_: object, **__: object) -> str:
    raise AssertionError("measured again")


@pytest.mark.usefixtures("_trusting")
@pytest.mark.parametrize("change", [lambda y: y * 1.01, lambda y: y * float("nan"), lambda y: y[:1]])
def test_a_wrong_form_is_dropped_with_one_warning(
    change: Callable[[Tensor], Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    hands = _Clock()
    monkeypatch.setattr(clock, "_seconds", hands.seconds)
    _patched(monkeypatch, EPILOGUE, hands.slow)
    _patched(monkeypatch, FORMS[0], change)
    with pytest.warns(RuntimeWarning, match=rf"same forward float32 .*{FORMS[0].name} gave wrong values") as caught:
        assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == EPILOGUE
    assert len(caught) == 1


@pytest.mark.usefixtures("_trusting")
def test_an_unsteady_form_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    noise = iter(range(100))
    _patched(monkeypatch, FORMS[0], lambda y: y * (1 + 1e-7 * next(noise)))
    with pytest.warns(RuntimeWarning, match="gave other values the second time"):
        assert tuning.choose(PROBLEM, DEVICE, FORMS[:1], "auto") == PLAIN


@pytest.mark.usefixtures("_trusting")
def test_a_form_that_does_not_compile_is_dropped(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(y: Tensor) -> Tensor:
        raise RuntimeError("out of registers")

    _patched(monkeypatch, FORMS[0], broken)
    with pytest.warns(RuntimeWarning, match=r"failed \(RuntimeError: out of registers\)"):
        assert tuning.choose(PROBLEM, DEVICE, FORMS[:1], "auto") == PLAIN


@pytest.mark.usefixtures("_trusting")
def test_forcing_what_is_wrong_raises(monkeypatch: pytest.MonkeyPatch) -> None:
    _patched(monkeypatch, FORMS[0], lambda y: y + 1)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Layer, "forms", lambda *_: FORMS[:1])
    monkeypatch.setattr(tuning, "_first_met", lambda one, _, impl: tuning.choose(one, DEVICE, FORMS[:1], impl))
    with (
        pytest.warns(RuntimeWarning),
        pytest.raises(RuntimeError, match=r"no kernel for same forward .* that is right"),
    ):
        tuning.form(PROBLEM, torch.device("cuda", 7), "fused")


def _children(monkeypatch: pytest.MonkeyPatch, *bodies: str) -> list[child.Child]:
    """Start children that run the bodies, one each and the last for all others; returns the list of started ones."""
    started: list[child.Child] = []

    class Counted(_CHILD):
        def __init__(self) -> None:
            body = bodies[min(len(started), len(bodies) - 1)] if bodies else ""
            command = [sys.executable, "-c", f"{_CHILD_BEGIN}\n{body}\ntrial.main()"]
            with mock.patch.object(child, "command", lambda: command):
                super().__init__()
            started.append(self)

    monkeypatch.setattr(child, "Child", Counted)
    return started


_CHILD = child.Child
_CHILD_BEGIN = """
import os, time, torch
from fastbegan_kernels import conv_layer, trial
real = conv_layer._forward
def with_change(change):
    def forward(form, *arguments):
        if form == conv_layer.EPILOGUE:
            change()
        return real(form, *arguments)
    conv_layer._forward = forward
"""
CRASHES = "with_change(lambda: os.kill(os.getpid(), 11))"
KILLED = "with_change(lambda: os.kill(os.getpid(), 9))"  # by the host's want of memory, say


def _raising(error: str) -> str:
    return f"def fail(): raise {error}\nwith_change(fail)"


def test_a_child_tries_what_is_new(monkeypatch: pytest.MonkeyPatch) -> None:
    started = _children(monkeypatch)
    fine = dict.fromkeys(FORMS, Trial(None))
    assert tuning.survivors(PROBLEM, DEVICE, FORMS) == fine
    other = Layer("same", False, "float32", (4, 16, 20, 20), (16, 16, 3, 3))  # sizes are no new kernel
    down = Layer("down", False, "float32", (2, 16, 6, 6), (16, 16, 3, 3))
    with mock.patch.object(child, "tried", _unwanted):
        assert tuning.survivors(PROBLEM, DEVICE, FORMS) == fine
        assert tuning.survivors(other, DEVICE, FORMS) == fine
        with pytest.raises(AssertionError, match="measured again"):
            tuning.survivors(down, DEVICE, FORMS)
    assert tuning.survivors(down, DEVICE, FORMS) == fine and len(started) == 1  # one child for all
    assert tuning.survivors(PROBLEM, DEVICE, FORMS, again=True) == fine and len(started) == 1
    started[0].process.kill()
    started[0].process.wait()  # as after a minute without work
    assert tuning.survivors(PROBLEM, DEVICE, FORMS, again=True) == fine and len(started) == 2


def test_a_child_that_was_left_in_the_middle_answers_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    started = _children(monkeypatch)

    def interrupted() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        child.tried(PROBLEM, DEVICE, FORMS, interrupted)
    assert child.tried(PROBLEM, DEVICE, [PLAIN]) == {PLAIN: Trial(None)} and len(started) == 2


def test_a_crash_is_the_childs_alone_and_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    started = _children(monkeypatch, CRASHES)
    forms = [FORMS[0], EPILOGUE, PLAIN]  # one before it and one behind
    fine, crash = Trial(None), Trial("killed its process (SIGSEGV)")
    assert tuning.survivors(PROBLEM, DEVICE, forms) == {FORMS[0]: fine, EPILOGUE: crash, PLAIN: fine}
    assert len(started) == 2
    remembered = {FORMS[0]: fine, EPILOGUE: Trial("failed or crashed in a trial"), PLAIN: fine}
    assert tuning.survivors(PROBLEM, DEVICE, forms) == remembered and len(started) == 2
    with pytest.warns(RuntimeWarning, match="library with epilogue failed or crashed in a trial"):
        assert tuning.choose(PROBLEM, DEVICE, [EPILOGUE], "auto") == PLAIN


LASTING = {
    CRASHES: True,
    KILLED: False,
    _raising("RuntimeError('CUDA error: an illegal memory access was encountered')"): True,
    _raising("RuntimeError('Triton Error [CUDA]: an illegal memory access was encountered')"): True,
    _raising("RuntimeError('Triton Error [CUDA]: out of memory')"): False,
    _raising("torch.OutOfMemoryError('CUDA out of memory')"): False,
    _raising("RuntimeError('Failed to find C compiler. Please specify via CC environment variable.')"): False,
    _raising("OSError(28, 'No space left on device')"): False,
    _raising("type('OutOfResources', (Exception,), {})('shared memory, Required: 300000')"): True,
}


@pytest.mark.parametrize(
    "body", [pytest.param(body, marks=() if body == CRASHES else pytest.mark.slow) for body in LASTING]
)
def test_only_a_kernels_own_faults_last(body: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Faults of the surroundings do not last: once they are repaired, the next process uses the kernels."""
    _children(monkeypatch, body)
    with pytest.warns(
        RuntimeWarning, match="with epilogue .* is not used|kernels are not used for now, as one"
    ) as caught:
        assert tuning.choose(PROBLEM, DEVICE, [EPILOGUE], "auto") == PLAIN
    assert len(caught) == 1
    child.close()
    monkeypatch.setattr(tuning, "_chosen", {})
    _children(monkeypatch)
    if LASTING[body]:
        assert tuning.choose(PROBLEM, DEVICE, [EPILOGUE], "auto") == PLAIN
    else:
        assert tuning.choose(PROBLEM, DEVICE, [EPILOGUE], "auto") == EPILOGUE


@pytest.mark.slow
@pytest.mark.parametrize("words", ["CUDA error: an illegal memory", "Triton Error [CUDA]: an illegal memory"])
def test_a_lost_context_is_the_fault_of_who_lost_it(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Later forms in the same child would fail too, so a new child tries them."""
    started = _children(monkeypatch, _raising(f"RuntimeError({words!r})"))
    found = tuning.survivors(PROBLEM, DEVICE, [EPILOGUE, FORMS[0]])
    assert found[EPILOGUE].fault and found[EPILOGUE].lasting and found[FORMS[0]] == Trial(None)
    assert len(started) == 2
    monkeypatch.setenv(child.VARIABLE, "inside")  # what is known to crash is not run in here
    assert tuning.survivors(PROBLEM, DEVICE, [EPILOGUE, PLAIN])[EPILOGUE].fault


def test_one_cause_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    _children(monkeypatch, _raising("RuntimeError('Failed to find C compiler')"))
    with pytest.warns(RuntimeWarning) as caught:
        for alpha in (0.5, 1.0, 2.0):
            tuning.choose(replace(PROBLEM, alpha=alpha), DEVICE, [EPILOGUE], "auto")
    (words,) = {str(one.message) for one in caught}
    assert len(caught) == 1 and "failed (RuntimeError: Failed to find C compiler)" in words


@pytest.mark.parametrize("harm", ["hangs", "no process", "no device", "no folder"])
def test_without_a_child_the_cause_and_a_way_on_are_named_once(
    harm: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exclusive or a full GPU must not decide for good, nor cost a doomed child for each problem."""
    busy = "RuntimeError('CUDA error: all devices are busy\\nCompile with `TORCH_USE_CUDA_DSA` to enable assertions.')"
    cause, started = "", _children(monkeypatch, f"def busy(*_, **__): raise {busy}\ntorch.ones = busy")
    if harm == "hangs":
        monkeypatch.setattr(child, "SECONDS", 0.0)
        cause = "it did not answer within 0 seconds"
    elif harm == "no process":
        monkeypatch.setattr(subprocess, "Popen", _no_process)
        cause = "BlockingIOError: no more processes"
    elif harm == "no device":
        cause = "RuntimeError: CUDA error: all devices are busy"
    else:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        cause = "FileNotFoundError: .*missing"
    with pytest.warns(RuntimeWarning, match=f"of their own: {cause}.*FASTBEGAN_TRIAL=inside") as caught:
        for alpha in (0.5, 1.0, 2.0):
            assert tuning.choose(replace(PROBLEM, alpha=alpha), DEVICE, FORMS, "auto") == PLAIN
    assert len(caught) == 1 and len(started) <= 1
    kept = cache.read(DEVICE)
    assert not kept["choices"] and not kept["passed"]
    monkeypatch.setenv(child.VARIABLE, "inside")
    assert tuning.choose(PROBLEM, DEVICE, FORMS[:1], "auto") == FORMS[0]


def test_a_child_begins_no_trials(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(child.VARIABLE, "child")
    monkeypatch.setattr(child, "tried", _unwanted)
    assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == PLAIN
    assert not cache.read(DEVICE)["choices"]


def _no_process(*_: object, **__: object) -> None:
    raise BlockingIOError("no more processes")


@pytest.mark.usefixtures("_trusting")
@pytest.mark.parametrize(
    "words", ["CUDA out of memory", "Triton Error [CUDA]: out of memory", "CUDNN_STATUS_ALLOC_FAILED"]
)
def test_want_of_memory_is_not_remembered(words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def starving(*_: object) -> Tensor:
        raise (torch.OutOfMemoryError if words.startswith("CUDA out") else RuntimeError)(words)

    monkeypatch.setattr(clock, "measure", starving)
    with pytest.warns(RuntimeWarning, match="not enough memory to measure"):
        assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == FORMS[0]
    _patched(monkeypatch, FORMS[0], starving)
    _patched(monkeypatch, FORMS[1], starving)
    with pytest.warns(RuntimeWarning, match="had not enough memory"):
        assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == PLAIN
    monkeypatch.setattr(Layer, "expected", starving)
    with pytest.warns(RuntimeWarning, match="nothing could be tried"):
        assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == PLAIN
    assert not cache.read(DEVICE)["choices"]


def test_what_is_not_for_good_is_not_kept_with_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "outcomes", lambda *_: [tuning.Outcome(EPILOGUE, "failed (no compiler)", None, False)])
    with pytest.warns(RuntimeWarning, match="no compiler"):
        assert tuning.choose(PROBLEM, DEVICE, [EPILOGUE], "auto") == PLAIN
    monkeypatch.setattr(tuning, "outcomes", lambda *_: [tuning.Outcome(EPILOGUE, None)])
    other = replace(PROBLEM, alpha=0.5)
    assert tuning.choose(other, DEVICE, [EPILOGUE], "auto") == EPILOGUE
    assert len(tuning.choices(DEVICE)["choices"]) == 2
    assert list(tuning.choices(DEVICE, lasting=True)["choices"].values()) == [EPILOGUE.name]


def test_choices_stay_where_the_search_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    monkeypatch.setattr(tuning, "outcomes", lambda *_: [tuning.Outcome(FORMS[0], None)])
    assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == FORMS[0]
    tuning.give_up_search()
    assert not torch.backends.cudnn.benchmark
    assert tuning._chosen[DEVICE, PROBLEM, "auto"] == FORMS[0]


def test_a_cache_that_cannot_be_read_is_not_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(DEVICE, "choices", {"a": "b"})
    text, mode = cache.cache_file().read_text(), cache.cache_file().stat().st_mode & 0o777
    mask = os.umask(0)
    os.umask(mask)
    assert mode == 0o666 & ~mask  # others may use the same folder

    def unreadable() -> dict[str, Any]:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(cache, "_stored", unreadable)
    assert "Permission denied" in (cache.write(DEVICE, "choices", {"c": "d"}) or "")
    assert cache.cache_file().read_text() == text and cache.read(DEVICE)["choices"]["c"] == "d"


@pytest.mark.parametrize("flag", ["benchmark", "deterministic"])
@pytest.mark.usefixtures("_trusting")
def test_a_choice_is_one_under_torchs_flags(flag: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "outcomes", lambda *_: [tuning.Outcome(FORMS[0], None)])
    assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == FORMS[0]
    monkeypatch.setattr(torch.backends.cudnn, flag, True)
    monkeypatch.setattr(tuning, "outcomes", lambda *_: [tuning.Outcome(FORMS[1], None)])
    assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == FORMS[1]
    assert len(cache.read(DEVICE)["choices"]) == 2 and getattr(torch.backends.cudnn, flag)


def test_problems_are_observed_and_prepared_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One run in plain forms collects the problems. One child then tries all of them, and counts."""
    gpu = torch.device("cuda", 7)
    started = _children(monkeypatch)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "environment", lambda device: "a GPU")
    monkeypatch.setattr(cache, "environment", lambda device: "a GPU")
    monkeypatch.setattr(Layer, "_tiles", lambda *_: FORMS[:1])
    with tuning.observed() as asked:
        assert tuning.form(PROBLEM, gpu, "auto") == PLAIN and not tuning.is_fused("fold", torch.float32, gpu, "auto")
        assert tuning.form(PROBLEM, gpu, "auto") == PLAIN
    assert len(asked) == 2 and not tuning._chosen and not started
    here = [(DEVICE, problem, impl) for _, problem, impl in asked]
    told: list[tuple[int, int]] = []
    tuning.prepare(here, lambda done, total: told.append((done, total)))
    assert told[:3] == [(1, 3), (2, 3), (3, 3)] and len(started) == 1 and len(tuning._chosen) == 2
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(child, "tried", _unwanted)
    tuning.prepare(here, lambda *_: pytest.fail("it tries again"))  # the second start tries nothing, and says nothing
    assert len(tuning._chosen) == 2


def test_nothing_is_raised_into_a_forward(monkeypatch: pytest.MonkeyPatch) -> None:
    """As where torch raises at cuDNN's version, because another card of the machine is too old."""

    def raising(*_: object) -> str:
        raise RuntimeError("cuDNN version (9, 2) is not compatible with devices with SM < 7.5")

    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(Layer, "_tiles", lambda *_: FORMS)
    monkeypatch.setattr(cache, "environment", raising)
    with pytest.warns(RuntimeWarning, match="nothing could be chosen .RuntimeError: cuDNN version"):
        assert tuning.form(PROBLEM, gpu, "auto") == PLAIN
    monkeypatch.setattr(torch.backends.cudnn, "version", raising)
    assert cache.cudnn_version() is None


def test_the_trial_runs_as_a_program() -> None:
    task = {
        "type": "Pointwise",
        "problem": {"op": "fold", "dtype": "float32"},
        "forms": ["fused"],
        "device": str(DEVICE),
    }
    environment = {**os.environ, "PYTHONPATH": str(Path(tuning.__file__).parent.parent)}
    pipes: dict[str, Any] = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.PIPE)
    with subprocess.Popen(child.command(), env=environment, text=True, **pipes) as process:
        assert process.stdin is not None and process.stdout is not None and process.stderr is not None
        for _ in range(2):
            process.stdin.write(json.dumps(task) + "\n")
            process.stdin.flush()
            lines = [process.stdout.readline().split() for _ in range(4)]
            assert lines == [["ready"], ["begin", "fused"], ["ran", "fused"], ["done"]]
        process.stdin.close()
        assert process.wait(300) == 0 and not process.stderr.read()  # it ends with its parent


@pytest.mark.usefixtures("_trusting")
@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": 1}', "null"])
def test_a_spoiled_cache_is_measured_anew(text: str) -> None:
    tuning.cache_file().parent.mkdir(parents=True, exist_ok=True)
    tuning.cache_file().write_text(text)
    assert tuning.choose(PROBLEM, DEVICE, FORMS[:1], "auto") == FORMS[0]
    assert json.loads(cache.cache_file().read_text())[tuning.environment(DEVICE)]["choices"]


@pytest.mark.parametrize("form", ["no such form", 5, None])
def test_a_form_that_does_not_exist_is_not_taken_from_the_cache(form: object, monkeypatch: pytest.MonkeyPatch) -> None:
    cache.write(DEVICE, "choices", {f"{PROBLEM!r} auto": form})
    monkeypatch.setattr(tuning, "outcomes", lambda *_: [tuning.Outcome(EPILOGUE, None)])
    assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == EPILOGUE


def test_choices_travel_to_machines_of_the_same_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "outcomes", lambda *_: [tuning.Outcome(FORMS[1], None)])
    tuning.choose(PROBLEM, DEVICE, FORMS, "auto")
    sent = json.loads(json.dumps(tuning.choices(DEVICE)))
    tuning.cache_file().unlink()
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(cache, "_here", {})
    monkeypatch.setattr(tuning, "outcomes", lambda *_: [tuning.Outcome(FORMS[0], None)])
    tuning.adopt(DEVICE, {**sent, "environment": "another GPU"})
    tuning.adopt(DEVICE, {"environment": sent["environment"], "choices": "spoiled"})
    assert not tuning._adopted
    tuning.adopt(DEVICE, sent)
    assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == FORMS[1]


def test_a_cache_that_cannot_be_written_only_warns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("FASTBEGAN_CACHE", str(file))
    monkeypatch.setattr(tuning, "outcomes", lambda *_: [tuning.Outcome(EPILOGUE, None)])
    with pytest.warns(RuntimeWarning, match="choices of kernels cannot be kept"):
        assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == EPILOGUE
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.choose(Layer(**{**vars(PROBLEM), "alpha": 0.5}), DEVICE, FORMS, "auto") == EPILOGUE
        monkeypatch.setattr(tuning, "_chosen", {})
        monkeypatch.setattr(tuning, "outcomes", _unwanted)
        assert tuning.choose(PROBLEM, DEVICE, FORMS, "auto") == EPILOGUE  # this process knows


@pytest.mark.usefixtures("_trusting")
def test_deterministic_algorithms_are_not_chosen_by_time(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(Layer, "_tiles", lambda *_: [Named("a"), Named("b")])
    assert PROBLEM.forms(gpu, "auto") == [EPILOGUE, Named("a"), Named("b")]
    assert PROBLEM.forms(gpu, "algebraic") == [EPILOGUE]
    torch.use_deterministic_algorithms(True)
    try:
        assert PROBLEM.forms(gpu, "fused") == [Named("a")]
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
        monkeypatch.setattr(tuning, "choose", lambda problem, device, forms, impl: (forms, impl))
        assert tuning.form(PROBLEM, gpu, "auto") == ([EPILOGUE], "algebraic")
    finally:
        torch.use_deterministic_algorithms(False)


def test_during_capture_nothing_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(Layer, "_tiles", lambda *_: [Named("a")])
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(tuning, "outcomes", _unwanted)
    with pytest.warns(RuntimeWarning, match="first met during graph capture"):
        assert tuning.form(PROBLEM, gpu, "auto") == PLAIN
    with pytest.warns(RuntimeWarning, match="fold float32 was first met during graph capture"):
        assert not tuning.is_fused("fold", torch.float32, gpu, "auto")
    tuning._chosen[gpu, PROBLEM, "auto"] = Named("a")  # met before
    assert tuning.form(PROBLEM, gpu, "auto") == Named("a")


def test_where_there_is_nothing_to_choose_nobody_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """A strided weight gradient has one form, and a dtype that no kernel knows has none; in a capture, too."""
    gpu = torch.device("cuda", 7)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    monkeypatch.setattr(cache, "write", _unwanted)
    strided = conv_layer.WeightGradient("down", "float32", (2, 16, 6, 6), (16, 16, 3, 3))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert tuning.form(strided, gpu, "auto") == PLAIN
        assert not tuning.is_fused("fold", torch.float8_e4m3fn, gpu, "auto")


def test_every_set_of_inputs_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers: list[int] = []

    def seconds(run: Callable[[int], object], device: torch.device, first: int) -> float:
        for call in range(first, first + clock._CALLS):
            run(call)
        return 1.0

    monkeypatch.setattr(clock, "_seconds", seconds)
    assert clock.measure({"a": numbers.append}, DEVICE) == {"a": clock.Timing(1.0, 0.0)}
    assert {number % clock._SETS for number in numbers} == set(range(clock._SETS))


def test_the_backward_of_a_race_runs_in_the_thread_that_holds_the_lock(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU autograd has a thread of its own, in which ops that ask for their form would wait for ever."""
    threads: list[bool] = []
    grad = torch.autograd.grad

    def watched(*arguments: Any, **options: Any) -> Any:
        threads.append(torch._C._is_multithreading_enabled())  # pyright: ignore[reportAttributeAccessIssue]
        return grad(*arguments, **options)

    monkeypatch.setattr(torch.autograd, "grad", watched)
    problem = Replacement("same", "elu", "float32", (1, 4, 4, 4), (4, 4, 3, 3), backward=True)
    assert len(problem.results(problem.plain, DEVICE)) == 4 and threads == [False]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the plain way is the CPU's")
@pytest.mark.parametrize("kind", ["same", "up"])
def test_every_way_to_a_weight_gradient_is_right(kind: str) -> None:
    weight = (24, 40, 4, 4) if kind == "up" else (40, 24, 3, 3)
    problem = conv_layer.WeightGradient(kind, "float32", (3, 24, 7, 5), weight)
    own, exact = problem.expected(DEVICE)
    (other,) = (form for form in problem.forms(torch.device("cuda", 7), "auto") if form != PLAIN)
    (got,) = problem.results(other, DEVICE)
    assert problems.excess(got, own[0], exact[0]) <= 1 and got.is_contiguous(memory_format=torch.channels_last)


def test_choices_are_found_whatever_the_device_is_called(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tensors are on cuda:0, while a command line has cuda."""
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(tuning, "environment", lambda device: f"machine of {device}")
    tuning._chosen[torch.device("cuda", 0), PROBLEM, "auto"] = Named("a")
    found = tuning.choices(torch.device("cuda"))
    assert found == {"environment": "machine of cuda:0", "choices": {f"{PROBLEM!r} auto": "a"}}
    tuning.adopt(torch.device("cuda"), found)
    assert tuning._adopted == found["choices"]


def test_the_key_tells_machines_and_sources_apart() -> None:
    facts = tuning.environment(DEVICE)
    assert all(word in facts for word in (f"torch {torch.__version__}", "triton ", "kernels ", DEVICE.type))


def test_every_problem_has_a_right_plain_form() -> None:
    """The checks themselves can be passed, and be failed."""
    layers = [
        Layer(kind, backward, "float32", (2, 16, 6, 8), weight, skip=2 if kind == "up" else 0, activation=activation)
        for kind, weight in (("same", (12, 16, 3, 3)), ("down", (12, 16, 3, 3)), ("up", (16, 12, 4, 4)))
        for backward, activation in ((False, "elu"), (True, "elu"), (True, None))
    ]
    for problem in layers:
        own, exact = problem.expected(DEVICE)
        assert all(value.dtype == torch.float64 for value in exact)
        assert all(problems.excess(*three) <= 1 for three in zip(own, own, exact, strict=True))
        assert problems.excess(own[0] * 1.001, own[0], exact[0]) > 1


@pytest.mark.parametrize(
    "op",
    [
        pytest.param(op, marks=pytest.mark.slow if op in ("group_norm_silu", "skip_gradient") else ())
        for op in problems.POINTWISE
    ],
)
def test_every_pointwise_kernel_passes_its_check(op: str) -> None:
    for dtype in ("float32", "float16"):
        if op == "equilibrium_update" and dtype != "float32":
            continue
        problem = Pointwise(op, dtype)
        own, exact = problem.expected(DEVICE)
        got = problem.results(FUSED, DEVICE)
        assert len(got) == len(exact)
        assert all(problems.excess(*three) <= 1 for three in zip(got, own, exact, strict=True))


@pytest.mark.parametrize("op", problems.POINTWISE)
def test_checks_run_the_kernel_that_they_check(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastbegan_kernels.fused import activation, fold, group_norm_silu, skip_phase_table

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("this is the kernel")

    places = {
        "activation_backward": (activation, "activation_backward"),
        "fold": (fold, "fold"),
        "group_norm_silu": (group_norm_silu, "forward"),
        "skip_gradient": (skip_phase_table, "skip_gradient"),
    }
    stem = importlib.import_module(f"fastbegan_kernels.fused.{op}") if op not in places else None
    monkeypatch.setattr(*places.get(op, (stem, op)), broken)
    problem = Pointwise(op, "float32")
    own, exact = problem.expected(DEVICE)
    assert "this is the kernel" in (tuning._checked(problem, DEVICE, FUSED, own, exact).fault or "")


def test_two_binaries_are_two_variants() -> None:
    """Channels loaded one by one need another binary than channels loaded in eights."""
    odd, whole = (
        Layer("same", False, "float32", (2, channels, 6, 6), (16, channels, 3, 3)).variant(FORMS[0])
        for channels in (3, 24)
    )
    assert odd != whole
    half = Layer("same", False, "float16", (2, 24, 6, 6), (16, 24, 3, 3)).variant(FORMS[0])
    back = Layer("same", True, "float32", (2, 24, 6, 6), (16, 24, 3, 3)).variant(FORMS[0])
    assert len({whole, half, back}) == 3


def test_a_large_batch_is_checked_in_part(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conv_layer, "_VALUES", 3 * 16 * 36)
    problem = Layer("same", True, "float32", (9, 16, 6, 6), (8, 16, 3, 3))
    part, whole = (problem.tensors(DEVICE, whole=w)["dz"] for w in (False, True))
    assert part is not None and whole is not None and (len(part), len(whole)) == (3, 9)


@pytest.mark.parametrize(("impl", "expected"), [("fused", FULL[-1]), ("auto", PLAIN)])
def test_without_a_gpu_nothing_is_measured(impl: str, expected: Form, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "outcomes", _unwanted)
    cpu = torch.device("cpu")
    small = Layer("same", False, "float32", (2, 16, 6, 6), (3, 16, 3, 3))
    assert tuning.form(small, cpu, impl) == expected
    assert tuning.is_fused("fold", torch.float32, cpu, impl) == (impl == "fused")
