"""Shipped kernels, as Triton compiles them for absent GPUs, executed on this CPU; README.md here says what that proves.

The kernels of this process are interpreted. So each test starts one without TRITON_INTERPRET.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.helpers.processes import ROOT, environment

triton = pytest.importorskip("triton")
PINNED = triton.__version__ == "3.9.0"  # other versions make other waits and barriers redundant
pytestmark = pytest.mark.skipif(
    tuple(map(int, triton.__version__.split(".")[:2])) < (3, 6),
    reason="the machine reads the PTX of Triton 3.6 and later",
)

SHIPPED = ("60", "80", "90", "100")
FAST = (  # of each family of kernels and each architecture, on small tiles
    "sm_80 conv input gradient bf16 pointer 64x16x16 w4 s3",
    "sm_80 conv stride 2 input gradient bf16 pointer 64x16x16 w4 s3",
    "sm_80 conv forward stride 2 fp32 pointer 64x16x16 w4 s2",
    "sm_80 conv forward tf32 pointer 64x32x32 w4 s3",
    "sm_80 upconv forward with skip bf16 pointer 64x16x16 w4 s3, channels odd",
    "sm_80 group norm gradient bf16",
    "sm_80 fold bf16",
    "sm_80 equilibrium update",
    "sm_80 l1 both eta 1 bf16",
    "sm_90 conv forward bf16 pointer 64x64x64 w4 s3",
    "sm_90 conv forward stride 2 bf16 tma 1x8x16x64x64 w4 s4",
    "sm_90 conv stride 2 input gradient bf16 tma 1x8x16x64x64 w4 s4",
    "sm_90 activation with skip bf16",
    "sm_90 activation backward bf16",
    "sm_90 skip gradient bf16",
    "sm_90 normalize images, windows bf16",
    "sm_60 l1 both eta 1 fp32",
    "sm_100 l1 both eta 1 bf16",
    "sm_100 conv forward fp32 pointer 64x16x16 w4 s2",
)
PLANTED = {  # architecture, configuration: whose faults are planted
    "mma": (80, "conv input gradient bf16 pointer 64x16x16 w4 s3"),
    "wgmma": (90, "conv forward bf16 pointer 64x64x64 w4 s3"),
    "tma": (90, "conv forward bf16 tma 1x8x16x64x64 w4 s4"),
}
REDUNDANT = {  # how many places of a kind may go unnoticed, and why these are harmless
    ("mma", "no wait"): (3, "Triton waits for each factor; the same groups are waited for again before they are read"),
    ("mma", "one wait less"): (4, "the same; and behind the loop only groups without copies are left"),
    ("mma", "no commit"): (1, "the first copies then belong to the second group, which is waited for with the first"),
    ("mma", "mask forgotten"): (3, "weights: masked only past the last step, where they are in bounds and not used"),
    ("wgmma", "one wait less"): (1, "behind the loop only groups without copies are left"),
    ("wgmma", "no commit"): (1, "the first copies then belong to the second group, which is waited for with the first"),
    ("wgmma", "mask forgotten"): (12, "weights: masked only past the last step, where they are in bounds and not used"),
    ("tma", "no barrier"): (15, "between them only one thread acts; one of four in each step is enough"),
    ("tma", "two barriers less"): (11, "the same"),
    ("tma", "three barriers less"): (9, "the same"),
}
FAST_KINDS = ("no barrier", "no wait", "no store", "matrix shifted", "mask forgotten", "no barriers in a loop")


def _run(*command: str, timeout: float) -> subprocess.CompletedProcess[str]:
    """Modules of this package in a process of their own; one thread each."""
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    whole = [sys.executable, "-m", *command]
    done = subprocess.run(whole, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=timeout, check=False)
    print(done.stdout)
    return done


def _jobs() -> str:
    return str(min(2, len(os.sched_getaffinity(0))))


def test_a_few_configurations_of_every_family_run_right() -> None:
    parts = [word for name in FAST for word in ("--part", name)]
    done = _run("tests.ptx", *SHIPPED, "--exact", "--jobs", _jobs(), *parts, timeout=300)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert f"{len(FAST)} executed, 0 bad" in done.stdout


@pytest.mark.slow
@pytest.mark.timeout(1800)  # with nothing in Triton's cache, beside another worker
def test_what_changed_since_it_was_recorded_and_an_eighth_of_the_rest_run_right() -> None:
    found = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    seed = found.stdout.strip() or "no commit"
    done = _run("tests.ptx", *SHIPPED, "--changed", "--eighth", seed, "--jobs", _jobs(), timeout=1700)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]


def _check_planted(where: str, *kinds: str) -> None:
    capability, name = PLANTED[where]
    done = _run("tests.ptx.faults", str(capability), name, *kinds, timeout=500)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert len(found) > 12 or set(kinds) == found.keys()
    for kind, tally in found.items():
        assert tally["noticed"], kind
        assert not PINNED or tally["missed"] == REDUNDANT.get((where, kind), (0, ""))[0], kind


def test_faults_in_compiled_code_are_noticed() -> None:
    _check_planted("mma", *FAST_KINDS)


@pytest.mark.slow
@pytest.mark.parametrize("where", PLANTED)
def test_faults_of_every_kind_are_noticed(where: str) -> None:
    _check_planted(where)


def test_faults_in_source_and_launches_are_noticed() -> None:
    done = _run("tests.ptx.source_faults", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    for name in ("stored input: ['global read-only written'", "read too soon: ['global uninitialised read'"):
        assert name in done.stdout
    assert done.stdout.count("['global out of bounds', 'result']") == 3  # without their halo masks


def test_names_and_lines_do_not_change_the_hash_of_a_kernel() -> None:
    code = (
        "from tests.ptx.record import hash_of\n"
        "from tests.ptx.configurations import gate_ptx\n"
        "from tests.helpers.cross_compile import cases\n"
        "text = gate_ptx(next(cases(80)), 80)\n"
        "name = text.partition('.entry ')[2].partition('(')[0]\n"
        "moved = text.replace(name, 'other').replace('.loc', '//').replace('$L__tmp', '$L__tmp9')\n"
        "moved = moved.replace('ld.param', '// a comment\\n ld.param')\n"
        "assert moved != text and hash_of([moved]) == hash_of([text, moved])\n"
        "assert hash_of([text.replace('add.f32', 'sub.f32')]) != hash_of([text])\n"
    )
    variables = {name: value for name, value in environment().items() if name != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, "-c", code], env=variables, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
