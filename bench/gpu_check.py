"""Everything a borrowed GPU is asked, in one run of under eight minutes: facts, numerics, a hunt, timings, a table.

`PYTHONPATH=.:kernels python bench/gpu_check.py --out FOLDER`, with torch, triton and numpy only; `--dry` runs the same
code on a CPU under Triton's interpreter, with tiny shapes and no claims about time.

This process never touches the GPU. Children do, and append an outcome per case to a file: where one dies of an illegal
access or hangs, its case is recorded and another child goes on behind it. Tolerance as in tests/kernels/test_fused.py,
plus 2^-9 of the largest value for TF32, whose operands Triton cuts off where cuDNN may round them or not use TF32.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from fastbegan_kernels import (
    conv2d_elu,
    equilibrium_update,
    l1_reconstruction_loss,
    normalize_images,
    reference,
    upsample_conv2d_elu,
)
from fastbegan_kernels.fold import fold_upsample, phases_of
from fastbegan_kernels.fused.tiles import FULL, HALF, Tile, pick_tile

ROOT = Path(__file__).resolve().parent.parent
DRY = "--dry" in sys.argv
DEVICE = "cpu" if DRY else "cuda"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32, "tf32": torch.float32}
MODES = ("fp16", "fp32") if DRY else ("bf16", "fp16", "fp32", "tf32")  # the interpreter multiplies bf16 wrongly
FAMILIES = {"conv": ("conv", "conv_grad"), "up": ("up", "up_grad")}
PIXELWISE = ("act", "l1", "normalize", "equilibrium")
LAST = 12_000  # characters of output that a device machine returns
Outcome = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """One thing to check or to time; all fields are plain, so that it travels to a child as JSON."""

    part: str  # facts, check or time
    op: str = ""
    mode: str = "fp32"
    shape: tuple[int, ...] = ()  # N, C, H, W, K; H and W are the input's, also of an up-convolution
    tiles: tuple[tuple[int, ...], ...] = ()  # check: the one to use; time: all candidates
    taps: int = 3
    stride: int = 1
    activation: str = "elu"
    alpha: float = 1.0
    eta: int = 1
    extra: bool = True  # bias, skip table, previous output, index and flip, gradient to the target
    compilers: tuple[str, ...] = ()  # modes of torch.compile to time as well
    seed: int = 0
    needs: float = 0.0  # seconds without which it is not worth beginning


def _environment() -> dict[str, str]:
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")))
    chosen = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"} | ({"TRITON_INTERPRET": "1"} if DRY else {})
    return {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "FASTBEGAN_IMPL")} | chosen


def _spawn(cases: list[Case], deadline: float, grace: float = 25) -> tuple[list[Outcome], str, str]:
    """Outcomes of the cases that one child came to, how it ended (done, crashed, timed out), and its last words."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "cases").write_text(json.dumps([asdict(case) for case in cases]))
        (folder / "results").touch()
        command = [sys.executable, __file__, "--child", name, "--deadline", str(deadline), *(["--dry"] if DRY else [])]
        with (folder / "errors").open("wb") as errors:
            process = subprocess.Popen(
                command, env=_environment(), stdout=errors, stderr=errors, stdin=subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            try:
                end = "done" if process.wait(max(5.0, deadline - time.time()) + grace) == 0 else "crashed"
            except subprocess.TimeoutExpired:
                end = "timed out"
                os.killpg(process.pid, signal.SIGKILL)  # compiler workers of the child go with it
                process.wait()
        words = (folder / "errors").read_text(errors="replace").strip()[-400:]
        return [json.loads(line) for line in (folder / "results").read_text().splitlines()], end, words


def work(cases: list[Case], deadline: float) -> list[Outcome]:
    """An outcome per case, in order, whatever becomes of the children."""
    outcomes: list[Outcome] = []
    crashes = 0
    while len(outcomes) < len(cases) and crashes < 3 and time.time() < deadline:
        found, end, words = _spawn(cases[len(outcomes) :], deadline)
        outcomes += found
        if end != "done" and len(outcomes) < len(cases):
            crashes += 1
            outcomes.append({"status": end, "note": words})
    why = "three children died" if crashes == 3 else "no time left"
    outcomes += [{"status": "skipped", "note": why}] * (len(cases) - len(outcomes))
    return [{"case": asdict(case), **outcome} for case, outcome in zip(cases, outcomes, strict=True)]


def work_together(groups: Iterable[list[Case]], deadline: float) -> list[Outcome]:
    """Groups of cases side by side, a child each: most of their time goes to compiling."""
    groups = list(groups)
    if DRY:  # starting a child takes longer than its cases
        groups = [list(itertools.chain.from_iterable(groups[first::2])) for first in (0, 1)]
    with ThreadPoolExecutor(2 if DRY else max(2, min(14, os.cpu_count() or 2))) as pool:
        return [outcome for group in pool.map(partial(work, deadline=deadline), groups) for outcome in group]


@contextmanager
def _poisoned() -> Iterator[None]:
    """Memory that a kernel should have written, and did not, is NaN."""

    def poison(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def made(*arguments: Any, **options: Any) -> Tensor:
            tensor = make(*arguments, **options)
            return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return made

    with mock.patch.multiple(torch, empty=poison(torch.empty), empty_like=poison(torch.empty_like)):
        yield


def _inputs(case: Case) -> list[Tensor]:
    """Random inputs of an op; images channels_last, weights scaled so that outputs are about 1."""
    n, c, h, w, k = case.shape
    generator = torch.Generator(DEVICE).manual_seed(case.seed)

    def draw(*shape: int, scale: float = 1.0) -> Tensor:
        values = (torch.randn(shape, generator=generator, device=DEVICE) * scale).to(DTYPES[case.mode])
        return values.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else values

    def output(*shape: int) -> Tensor:
        return reference.activate(draw(*shape), case.activation, case.alpha)

    if case.op in ("conv", "up"):
        # one scale for both: the nine taps of an up-convolution are all there is
        given = [draw(n, c, h, w), draw(k, c, case.taps, case.taps, scale=(case.taps**2 * c) ** -0.5)]
        if case.extra or case.op == "up":
            given.append(draw(k))
        size = math.gcd(h, w)
        return [*given, draw(n, 3, 3, size, size, k)] if case.extra and case.op == "up" else given
    if case.op in ("conv_grad", "up_grad"):
        up = 2 if case.op == "up_grad" else 1
        given = [draw(n, k, up * h, up * w), draw(k, c, case.taps, case.taps, scale=(case.taps**2 * k) ** -0.5)]
        return [*given, output(n, c, h, w)] if case.extra else given
    if case.op == "act":
        return [draw(n, k, h, w), output(n, k, h, w)]
    if case.op == "l1":
        return [draw(n, c, h, w), draw(n, c, h, w), draw(n).float()]
    if case.op == "normalize":
        stored = n + 3 if case.part == "check" or DRY else 64 * n  # timed: a set that does not fit into the L2 cache
        images = torch.randint(0, 256, (stored, h, w, c), generator=generator, device=DEVICE, dtype=torch.uint8)
        index = torch.randint(0, stored, (n,), generator=generator, device=DEVICE)
        return [images, index, torch.rand(n, generator=generator, device=DEVICE) < 0.5] if case.extra else [images]
    return [draw(n).abs(), draw(n).abs()]


def _controlled(losses: list[Tensor], impl: str, skip: bool) -> list[Tensor]:
    """k, sums and window after one update."""
    like: dict[str, Any] = {"device": DEVICE, "dtype": losses[0].dtype}
    k, sums = torch.full((), 0.2, **like), torch.ones(6, **like)
    window = torch.ones(2, device=DEVICE, dtype=torch.float64)
    flag = torch.tensor(False, device=DEVICE) if skip else None
    equilibrium_update(losses[0], losses[1], k, sums, window, flag, gamma=0.5, lambda_k=0.01, impl=impl)
    return [k, sums, window]


def _fused(case: Case, given: list[Tensor]) -> list[Tensor]:
    """What the kernels give, by their launchers."""
    from fastbegan_kernels.fused import launch

    tile = Tile(*case.tiles[0]) if case.tiles else None
    act: dict[str, Any] = {"activation": case.activation, "alpha": case.alpha}
    dtype = DTYPES[case.mode]
    third = given[2] if len(given) > 2 else None
    if case.op == "conv":
        return [launch.conv2d_elu(given[0], given[1], third, stride=case.stride, tile=tile, **act)]
    if case.op == "up":
        phases = phases_of(fold_upsample(given[1])).to(dtype)
        skip = given[3] if len(given) > 3 else None
        return [launch.upsample_conv2d_elu(given[0], phases, third, skip, tile=tile, **act)]
    if case.op in ("conv_grad", "up_grad"):
        weight = fold_upsample(given[1]) if case.op == "up_grad" else given[1]
        act = act if case.extra else {}  # without a previous output the launcher would apply the activation itself
        op = launch.upsample_conv2d_elu_input_gradient if case.op == "up_grad" else launch.conv2d_elu_input_gradient
        return [value for value in op(given[0], weight, third, tile=tile, **act) if value is not None]
    if case.op == "act":
        return list(launch.activation_backward(given[0], given[1], **act))
    if case.op == "l1":
        loss = launch.l1_reconstruction_loss(given[0], given[1], eta=case.eta)
        gradients = launch.l1_reconstruction_loss_gradient(
            given[2], given[0], given[1], eta=case.eta, to_target=case.extra
        )
        return [loss, *(value for value in gradients if value.numel())]
    if case.op == "normalize":
        images, index, flip = given if case.extra else (given[0], None, None)
        return [launch.normalize_images(images, index, flip, dtype)]
    return _controlled(given, "fused", case.extra)


def _slope(y: Tensor, activation: str, alpha: float) -> Tensor:
    """act'(z) from y = act(z)."""
    one = torch.ones_like(y)
    low = {"elu": y + alpha, "relu": 0 * one, "leaky_relu": alpha * one}.get(activation, one)
    return torch.where(y > 0, one, low)


def _plain(case: Case, given: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The same by PyTorch's own ops, in the dtype of what is given."""
    act: dict[str, Any] = {"activation": case.activation, "alpha": case.alpha}
    if case.op == "conv":
        return [reference.conv2d_elu(*given, stride=case.stride, **act)]
    if case.op == "up":
        return [reference.upsample_conv2d_elu(*given[:3], skip=given[3] if len(given) > 3 else None, **act)]
    if case.op in ("conv_grad", "up_grad"):
        dz, weight, *previous = given
        op = reference.upsample_conv2d_elu if case.op == "up_grad" else reference.conv2d_elu
        n, c, h, w, _ = case.shape
        x = torch.zeros(n, c, h, w, device=DEVICE, dtype=dtype, requires_grad=True)
        (dx,) = torch.autograd.grad(op(x, weight, activation="none"), x, dz)
        dx = dx * _slope(previous[0], **act) if previous else dx
        return [dx, dx.sum((0, 2, 3))] if previous else [dx]
    if case.op == "act":
        dz = given[0] * _slope(given[1], **act)
        return [dz, dz.sum((0, 2, 3))]
    if case.op == "l1":
        leaves = [value.detach().requires_grad_() for value in given[: 2 if case.extra else 1]]
        loss = reference.l1_reconstruction_loss(leaves[0], leaves[-1] if case.extra else given[1], eta=case.eta)
        return [loss.detach(), *torch.autograd.grad(loss, leaves, given[2].to(loss.dtype))]
    if case.op == "normalize":
        return [reference.normalize_images(*given, dtype=dtype)]
    return _controlled(given, "reference", case.extra)


def _excess(got: Tensor, own: Tensor, exact: Tensor, case: Case, half_output: bool = False) -> float:
    """Largest error over the allowed one; above 1 is wrong, NaN and a wrong shape count as 1e9."""
    if got.shape != exact.shape:
        return 1e9
    dtype = DTYPES[case.mode]
    half = dtype != torch.float32
    largest = exact.abs().max().item()
    factor = 4 if case.op.startswith("up") and half else 2  # folded weights round after folding
    allowed = factor * (own.double() - exact).abs().max().item() + 1e-6 * max(1.0, largest)
    allowed += 2**-9 * largest if half_output or case.mode == "tf32" else 0.0
    allowed += 2**-8 * largest if DRY and case.mode == "bf16" else 0.0  # the interpreter cuts off instead of rounding
    error = (got.double() - exact).abs().max().item()
    return min(error / allowed, 1e9) if math.isfinite(error) else 1e9


def check(case: Case) -> Outcome:
    """A kernel against float64, twice: right, wrong, or unsteady where two runs differ in a bit."""
    torch.backends.cudnn.allow_tf32 = case.mode == "tf32"
    given = _inputs(case)
    own = _plain(case, given, DTYPES[case.mode])
    exact = _plain(case, [v.double() if v.is_floating_point() else v for v in given], torch.float64)
    with _poisoned():
        got, again = _fused(case, given), _fused(case, given)
    excess = max(_excess(*three, case) for three in zip(got, own, exact, strict=True))
    same = all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    return {"status": "wrong" if excess > 1 else "right" if same else "unsteady", "excess": excess}


def facts(_: Case) -> Outcome:
    """The device and its ceilings: copy bandwidth in bytes read and written a second, matrix rates in FLOP/s."""
    import triton

    known: Outcome = {"status": "right", "device": "cpu (dry run)", "torch": torch.__version__}
    known |= {"triton": triton.__version__, "python": sys.version.split()[0], "l2_bytes": 1 << 20}
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        known |= {"device": properties.name, "capability": f"{properties.major}.{properties.minor}"}
        known |= {"processors": properties.multi_processor_count, "memory_bytes": properties.total_memory}
        known |= {"l2_bytes": _l2(), "cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version()}
    known["copy_bytes_per_s"] = _copy_rate(1 << (18 if DRY else 31))
    size = 64 if DRY else 8192
    known["flop_per_s"] = rates = {}
    for mode, dtype in DTYPES.items():
        torch.backends.cuda.matmul.allow_tf32 = mode == "tf32"
        a, b = (torch.randn(size, size, device=DEVICE).to(dtype) for _ in range(2))
        rates[mode] = 2 * size**3 / _measure({"": lambda _, a=a, b=b: a @ b}, 1)[""]["ms"] * 1e3
    return known


def _copy_rate(size: int) -> float:
    source = torch.randn(size // 4, device=DEVICE)
    target = torch.empty_like(source)
    return 2 * size / _measure({"copy": lambda _: target.copy_(source)}, 1)["copy"]["ms"] * 1e3


def _l2() -> int:
    return getattr(torch.cuda.get_device_properties(0), "L2_cache_size", 1 << 26) if not DRY else 1 << 20


def _capture(run: Callable[[int], object], sets: int) -> tuple[Callable[[], object], Outcome]:
    """Several calls over rotating inputs as one replay, and what is known of a call so far; raises where none runs."""
    warm, calls = (0, 1) if DRY else (3, 5)

    def loop(count: int) -> None:
        for number in range(count):
            run(number % sets)

    loop(warm)
    _wait()
    start = time.perf_counter()
    loop(calls)
    _wait()
    direct = (time.perf_counter() - start) / calls  # with the host's share
    # enough calls a replay that the events' own microseconds do not count
    repeat = 1 if DRY else min(64, max(sets, math.ceil(1e-3 / direct)))
    known: Outcome = {"direct_us": direct * 1e6, "calls": repeat, "graph": False}
    plain = partial(loop, repeat)
    if DRY:
        return plain, known
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run(0)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            plain()
    except Exception as error:
        _wait()  # raises where the context is lost
        return plain, known | {"capture": _named(error)}
    return graph.replay, known | {"graph": True}


def _try_capture(run: Callable[[int], object], sets: int) -> tuple[Callable[[], object] | None, Outcome]:
    try:
        return _capture(run, sets)
    except Exception as error:
        _wait()
        return None, {"error": _named(error)}


def _measure(candidates: dict[str, Callable[[int], object]], sets: int, seconds: float = 0.25) -> dict[str, Outcome]:
    """Median milliseconds a call of each candidate, turn by turn; {"error": ...} where one cannot run."""
    captured = {name: _try_capture(run, sets) for name, run in candidates.items()}
    ready = {name: replay for name, (replay, _) in captured.items() if replay is not None}

    def once() -> dict[str, float]:
        marks = {name: _stopwatch(replay) for name, replay in ready.items()}
        _wait()
        return {name: read() / captured[name][1]["calls"] for name, read in marks.items()}

    rounds = 1
    if not DRY:
        once()
        start = time.perf_counter()
        once()
        rounds = min(40, max(9, int(seconds / (time.perf_counter() - start))))
    times = [once() for _ in range(rounds)]
    for name in ready:
        values = sorted(row[name] for row in times)
        spread = [values[int(share * (rounds - 1))] for share in (0.2, 0.8)]
        captured[name][1].update({"ms": statistics.median(values), "p20_p80": spread, "rounds": rounds})
    return {name: known for name, (_, known) in captured.items()}


def _stopwatch(run: Callable[[], object]) -> Callable[[], float]:
    """Run, and return what will tell its milliseconds once the device is done."""
    if DRY:
        start = time.perf_counter()
        run()
        took = 1e3 * (time.perf_counter() - start)
        return lambda: took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    return lambda: begin.elapsed_time(end)


def _wait() -> None:
    if not DRY:
        torch.cuda.synchronize()


def _named(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def _with_tile(tile: tuple[int, ...], op: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """The op's forward with this tile; its backward takes the tile that is in force when it runs."""

    def run(*arguments: Tensor) -> Tensor:
        from fastbegan_kernels.fused import launch

        launch.pick_tile = lambda *_: Tile(*tile)  # pyright: ignore[reportAttributeAccessIssue]
        return op(*arguments)

    return run


def _bound(op: Callable[..., Tensor], **settings: Any) -> Callable[..., Tensor]:
    def run(*arguments: Tensor) -> Tensor:
        return op(*arguments, **settings)

    return run


def _ops(case: Case) -> dict[str, Callable[..., Tensor]]:
    """The candidates of a case by name; eager PyTorch first, everything else is compared with it."""
    if case.op in FAMILIES:
        op = conv2d_elu if case.op == "conv" else upsample_conv2d_elu
        found: dict[str, Callable[..., Tensor]] = {"eager": _bound(op, impl="reference")}
        if case.op == "up":  # the algebraic tier of a plain convolution is the library's own
            found["algebraic"] = _bound(op, impl="algebraic")
        found |= {f"fused {tile_name(tile)}": _with_tile(tile, _bound(op, impl="fused")) for tile in case.tiles}
    elif case.op == "equilibrium":
        found = {"eager": _controller("reference"), "fused": _controller("fused")}
    else:
        op = l1_reconstruction_loss if case.op == "l1" else normalize_images
        more: dict[str, Any] = {} if case.op == "l1" else {"dtype": DTYPES[case.mode]}
        found = {"eager": _bound(op, impl="reference", **more), "fused": _bound(op, impl="fused", **more)}
    for mode in case.compilers:
        options: dict[str, Any] = {"backend": "eager"} if DRY else {"mode": mode}
        compiled = torch.compile(found["eager"], dynamic=False, **options)
        found["compile" if mode == "default" else mode.removesuffix("-no-cudagraphs")] = compiled
    return found


def _controller(impl: str) -> Callable[..., Tensor]:
    k, sums = torch.full((), 0.2, device=DEVICE), torch.ones(6, device=DEVICE)
    window = torch.ones(2, device=DEVICE, dtype=torch.float64)

    def run(real: Tensor, fake: Tensor) -> Tensor:
        equilibrium_update(real, fake, k, sums, window, gamma=0.5, lambda_k=1e-3, impl=impl)
        return k

    return run


def _results(op: Callable[..., Tensor], given: list[Tensor], grad: Tensor | None) -> list[Tensor]:
    """Output and, where there is a gradient to begin from, the gradients of all inputs that want one."""
    if grad is None:
        with torch.no_grad():
            return [op(*given)]
    output = op(*given)
    return [output.detach(), *torch.autograd.grad(output, [v for v in given if v.requires_grad], grad)]


def _distance(got: list[Tensor], own: list[Tensor]) -> float:
    """The largest relative difference, by norm, of a candidate's results from eager PyTorch's."""
    pairs = zip(got, own, strict=True)
    found = [((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30)).item() for a, b in pairs]
    return max(value if math.isfinite(value) else 1e9 for value in found)


def _wrong(
    case: Case, eager: Callable[..., Tensor], got: list[Tensor], own: list[Tensor], given: list[Tensor],
    grad: Tensor | None,
) -> str:  # fmt: skip
    """Why a candidate may not be timed: far from eager, or too far from float64 in the first and the last sample."""
    distance = _distance(got, own)
    if distance > (2e-2 if DTYPES[case.mode] != torch.float32 else 1e-3):
        return f"{distance:.2g} from eager by norm"
    if case.op not in FAMILIES:
        return ""
    ends = [0, case.shape[0] - 1]
    exact_in = [value.detach()[ends if not number else slice(None)].double() for number, value in enumerate(given)]
    exact_in[0].requires_grad_(grad is not None)
    torch.backends.cudnn.benchmark = False  # once only: a search would take longer
    exact = _results(eager, exact_in, None if grad is None else grad[ends].double())
    torch.backends.cudnn.benchmark = True
    triples = enumerate(zip(got, own, exact, strict=False))  # output and input gradient; the others sum over samples
    excess = max(_excess(g[ends], o[ends], e, case, half_output=number > 0) for number, (g, o, e) in triples)
    return f"{excess:.2g} times the allowed error" if excess > 1 else ""


def timing(case: Case) -> Outcome:
    """Forward, and forward + backward where there is one, of all candidates that are right at this shape."""
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = False
    torch._dynamo.reset()
    first = _inputs(case)[: 2 if case.op == "l1" else None]
    moved = first[0][: case.shape[0]].nbytes if case.op == "normalize" else sum(v.nbytes for v in first)
    # inputs rotate over more than the L2 cache, in as many sets as are worth their memory
    sets = 2 if DRY else min(32, math.ceil(1.5 * _l2() / moved))
    given = [first, *(_inputs(replace(case, seed=s))[: len(first)] for s in range(1, sets))]
    if case.op == "normalize":
        given = [[first[0], *others[1:]] for others in given]  # one set of images, other picks
    wants = 0 if case.op in ("normalize", "equilibrium") else 1 if case.op == "l1" and not case.extra else len(first)
    outcome: Outcome = {"status": "timed", "sets": sets, "input_bytes": moved, "dropped": {}}
    for backward in (False, True) if wants else (False,):
        for value in itertools.chain.from_iterable(v[:wants] for v in given):
            value.requires_grad_(backward)
        ops = _ops(case)
        grad = torch.randn_like(_results(ops["eager"], first, None)[0]) if backward else None
        own = _results(ops["eager"], first, grad)
        runs: dict[str, Callable[[int], object]] = {}
        for name, op in ops.items():
            try:
                with _poisoned() if name.startswith("fused") else ExitStack():
                    got = own if name == "eager" else _results(op, first, grad)
                why = "" if name == "eager" else _wrong(case, ops["eager"], got, own, first, grad)
            except Exception as error:
                _wait()  # raises where the context is lost
                why = _named(error)
            if why:
                outcome["dropped"][f"{name} {'both' if backward else 'forward'}"] = why
            else:
                runs[name] = lambda number, op=op, grad=grad: _results(op, given[number], grad)
        outcome["both" if backward else "forward"] = _measure(runs, sets)
    if not DRY:
        torch.cuda.empty_cache()
    return outcome


def child(folder: Path, deadline: float) -> None:
    """Do what cases say, an outcome a line. Ends with an error where the GPU's context is lost."""
    cases = json.loads((folder / "cases").read_text())
    torch.set_num_threads(1)
    parts: dict[str, Callable[[Case], Outcome]] = {"facts": facts, "check": check, "time": timing}
    with (folder / "results").open("a") as log:
        for fields in cases:
            case = Case(**fields)
            try:
                late = time.time() + case.needs > deadline
                outcome = {"status": "skipped", "note": "no time left"} if late else parts[case.part](case)
                _wait()
            except Exception as error:
                _wait()
                outcome = {"status": "failed", "note": _named(error)}
            print(json.dumps(outcome), file=log, flush=True)


def tile_name(tile: tuple[int, ...]) -> str:
    m, k, c, warps, stages = tile
    return f"{m}x{k}x{c} w{warps} s{stages}"


def _plain_tiles(mode: str) -> list[tuple[int, ...]]:
    table = [(t.block_m, t.block_k, t.block_c, t.warps, t.stages) for t in (FULL if "32" in mode else HALF)]
    return table[-1:] if DRY else table


def numeric_groups() -> Iterator[list[Case]]:
    """Every kernel, mode and tile, a child per family, mode and tile."""
    # the first four are what the timings will ask of the compiler, whose cache is warm then
    shapes = [(2, 128, 16, 16, 128), (2, 64, 16, 16, 64), (2, 128, 8, 8, 128), (2, 64, 8, 8, 64), (3, 70, 6, 5, 66)]
    shapes += [(2, 20, 7, 9, 12), (1, 3, 16, 16, 24), (2, 32, 5, 5, 3), (1, 5, 1, 1, 7)]
    shapes = [(1, 20, 3, 4, 12)] if DRY else shapes
    for mode, family in itertools.product(MODES, FAMILIES):
        for tile in _plain_tiles(mode):
            cases: list[Case] = []
            for shape in shapes if DRY or mode == MODES[0] else shapes[:1] + shapes[4:]:
                base = Case("check", family, mode, shape, (tile,))
                none = replace(base, op=f"{family}_grad", activation="none", extra=False)
                cases += [base, none, replace(none, activation="elu", extra=True)]
                cases.append(replace(base, stride=2) if family == "conv" else replace(base, extra=False))
            if family == "conv":
                cases += [replace(case, taps=1) for case in cases[4:8]]
            yield cases
    modes = [mode for mode in DTYPES if mode != "tf32"]
    sizes = [(2, 3, 4, 4, 5)] if DRY else [(16, 3, 64, 64, 128), (3, 3, 7, 5, 20), (1, 5, 1, 1, 3)]
    pixelwise = [Case("check", op, m, s) for op, m, s in itertools.product(("act", "l1", "normalize"), modes, sizes)]
    pixelwise += [replace(case, extra=False, eta=2) for case in pixelwise if case.op != "act"]
    pixelwise += [replace(case, eta=2) for case in pixelwise if case.op == "l1" and case.eta == 1]
    pixelwise += [Case("check", "equilibrium", "fp32", (n,) * 5, extra=e) for n in (1, 16, 300) for e in (False, True)]
    yield pixelwise


def hunted(seed: int, count: int, capability: int) -> list[Case]:
    """Random odd cases; half of them with the tile that the launcher would pick."""
    rng = random.Random(seed)
    odd = [1, 2, 3, 5, 8, 9] if DRY else [1, 2, 3, 5, 8, 15, 16, 17, 24, 31, 33, 48, 63, 64, 65, 96, 127, 128, 130, 257]
    cases: list[Case] = []
    for number in range(count):
        op = rng.choice(["conv", "conv", "conv_grad", "conv_grad", "up", "up", "up_grad", "up_grad", *PIXELWISE])
        matrix = op not in PIXELWISE
        mode = rng.choice(MODES if matrix else ("fp32",) if op == "equilibrium" else ("bf16", "fp16", "fp32"))
        high, wide = (rng.choice([1, 2, 3, 4, rng.randint(1, 5 if DRY else 37)]) for _ in range(2))
        n, c, k = rng.choice([1, 1, 2, 3, 5]), rng.choice(odd), rng.choice(odd)
        tile = rng.choice(_plain_tiles(mode))
        if rng.random() < 0.5:
            picked = pick_tile(DTYPES[mode], n * high * wide, c, k, capability)
            tile = (picked.block_m, picked.block_k, picked.block_c, picked.warps, picked.stages)
        activation = rng.choice(["elu", "elu", "relu", "leaky_relu", "none"])
        convolution = op in FAMILIES["conv"]
        cases.append(
            Case(
                "check", op, mode, (n, c, high, wide, k), (tile,) if matrix else (),
                taps=rng.choice([1, 3, 3]) if convolution else 3, stride=rng.choice([1, 2]) if op == "conv" else 1,
                activation=activation, alpha=rng.choice([1.0, 0.3]), eta=rng.choice([1, 2]),
                extra=rng.random() < 0.7, seed=1000 * seed + number,
            )
        )  # fmt: skip
    return cases


def right_tiles(outcomes: list[Outcome], family: str) -> tuple[tuple[int, ...], ...]:
    """Tiles that may be timed in the timings' mode: seen right, and never anything but right."""
    mode = MODES[0]
    good: list[tuple[int, ...]] = []
    for tile in _plain_tiles(mode):
        seen = {
            outcome["status"]
            for outcome in outcomes
            if outcome["case"]["op"] in FAMILIES[family]
            and outcome["case"]["mode"] == mode
            and tile in map(tuple, outcome["case"]["tiles"])
        }
        if seen - {"skipped"} == {"right"}:
            good.append(tile)
    return tuple(good)


def _never_wrong(outcomes: list[Outcome], op: str, mode: str) -> bool:
    seen = {o["status"] for o in outcomes if (o["case"]["op"], o["case"]["mode"]) == (op, mode)}
    return seen - {"skipped"} == {"right"}


def layer_cases(outcomes: list[Outcome]) -> list[Case]:
    """conv and up at the shapes of the networks, what matters most first; `size` is the larger map's side."""
    sizes, widths, batches = ((4,), (4,), (1,)) if DRY else ((64, 32, 128, 16, 8), (128, 64), (16, 64))
    tiles = {family: right_tiles(outcomes, family) for family in FAMILIES}
    if not _never_wrong(outcomes, "act", MODES[0]):  # every fused backward begins with it
        tiles = dict.fromkeys(tiles, ())
    return [
        Case(
            "time", family, MODES[0], (batch, n, side, side, n), tiles[family], extra=family == "conv",
            needs=0 if DRY else 4,
        )
        for batch, n, size in itertools.product(batches, widths, sizes)
        for family in FAMILIES
        for side in (size if family == "conv" else size // 2,)
    ]  # fmt: skip


def small_cases(outcomes: list[Outcome]) -> list[Case]:
    """The loss at training shapes and at 256 MiB a tensor, batches, and the controller; the ones never seen wrong."""
    compilers = ("default",)
    cases = [Case("time", "normalize", "bf16", (n, 3, 128, 128, 3)) for n in (16, 64)]
    cases += [Case("time", "equilibrium", "fp32", (64,) * 5)]
    for mode, extra in itertools.product(("bf16", "fp32"), (True, False)):
        huge = 256 * 2**20 // (3 * 128 * 128 * DTYPES[mode].itemsize)
        shapes = [(16, 3, 64, 64, 3), (64, 3, 128, 128, 3), (huge, 3, 128, 128, 3)]
        cases += [Case("time", "l1", mode, shape, extra=extra, compilers=compilers, needs=8) for shape in shapes]
    if DRY:
        cases = [replace(cases[0], shape=(2, 3, 4, 4, 3)), cases[2]]
        cases += [Case("time", "l1", "fp32", (2, 3, 4, 4, 3), compilers=compilers)]
    return [case for case in cases if _never_wrong(outcomes, case.op, case.mode)]


def _best(measured: dict[str, Outcome], prefix: str) -> tuple[str, float] | None:
    """Name and milliseconds of the fastest candidate whose name begins so."""
    found = [(v["ms"], k) for k, v in measured.items() if k.startswith(prefix) and "ms" in v]
    return (min(found)[1], min(found)[0]) if found else None


def compile_cases(timed: list[Outcome]) -> list[Case]:
    """The same shapes with torch.compile, beside the best tile only; max-autotune for one shape of each family."""
    cases: list[Case] = []
    for outcome in timed:
        if outcome["status"] != "timed" or outcome["case"]["op"] not in FAMILIES:
            continue
        fields = outcome["case"]
        best = _best(outcome.get("both") or outcome["forward"], "fused") or _best(outcome["forward"], "fused")
        tiles = tuple(tuple(t) for t in fields["tiles"] if best and best[0] == f"fused {tile_name(tuple(t))}")
        # without CUDA graphs of its own: replays are captured here for every candidate alike
        slow = ("max-autotune-no-cudagraphs",) if len(cases) < 2 else ()
        needs = 0 if DRY else 50 if slow else 12
        case = Case(**{**fields, "shape": tuple(fields["shape"]), "tiles": tiles, "needs": needs})
        cases.append(replace(case, compilers=("default", *slow)))
    return (
        cases[:1] if DRY else cases[2:4] + cases[:2] + cases[4:]
    )  # if the slow ones end the time, two others are known


def _ratio(measured: dict[str, Outcome], rival: str, own: str = "fused") -> str:
    a, b = _best(measured, rival), _best(measured, own)
    return f"{a[1] / b[1]:.2f}" if a and b else "-"


def layer_rows(results: Outcome) -> list[list[str]]:
    """A row per shape, forward and then forward + backward: what fused takes, how many times the others, best tile."""
    compiled = {_place(o): o for o in results["compiled"] if o["status"] == "timed"}
    columns = ["us", "/eager", "/alg", "/comp", "/max", "tile"]
    rows = [["op", "n", "map", "batch", *(f"fwd {columns[0]}", *columns[1:]), *(f"both {columns[0]}", *columns[1:])]]
    for outcome in results["layers"]:
        if outcome["status"] != "timed":
            continue
        op, (batch, n, side, *_) = outcome["case"]["op"], outcome["case"]["shape"]
        row = [op, str(n), str(side * (2 if op == "up" else 1)), str(batch)]
        for direction in ("forward", "both"):
            here = outcome[direction]
            there = compiled.get(_place(outcome), {}).get(direction, {})
            best = _best(here, "fused")
            row += [f"{1e3 * best[1]:.1f}" if best else "-", _ratio(here, "eager"), _ratio(here, "algebraic")]
            row += [_ratio(there, "compile"), _ratio(there, "max-autotune")]
            row.append(best[0].removeprefix("fused ").replace(" ", "") if best else "-")
        rows.append(row)
    return rows


def _place(outcome: Outcome) -> tuple[Any, ...]:
    return outcome["case"]["op"], *outcome["case"]["shape"]


def small_rows(results: Outcome) -> list[list[str]]:
    """Loss, batches, controller: milliseconds and ratios; for the loss the share of the measured copy bandwidth.

    `moved` counts what the two passes move (two reads each, and the gradients); `least` two reads and the gradients.
    """
    rows = [["op", "mode", "shape", "gradients", "fused us", "/eager", "/compile", "moved", "least"]]
    bandwidth = results["facts"][0].get("copy_bytes_per_s", math.nan)
    for outcome in results["small"]:
        if outcome["status"] != "timed":
            continue
        case = Case(**outcome["case"])
        here = outcome.get("both") or outcome["forward"]
        best, shares = _best(here, "fused"), ["-", "-"]
        gradients = (2 if case.extra else 1) if case.op == "l1" else 0
        if case.op == "l1" and best:
            size = math.prod(case.shape[:4]) * DTYPES[case.mode].itemsize
            shares = [f"{size * (reads + gradients) / best[1] * 1e3 / bandwidth:.0%}" for reads in (4, 2)]
        shape = "x".join(map(str, case.shape[: 1 if case.op == "equilibrium" else 4]))
        row = [case.op, case.mode, shape, str(gradients), f"{1e3 * best[1]:.1f}" if best else "-"]
        rows.append([*row, _ratio(here, "eager"), _ratio(here, "compile"), *shares])
    return rows


def _markdown(rows: list[list[str]]) -> str:
    head, *body = ("| " + " | ".join(row) + " |" for row in rows)
    return "\n".join([head, "|" + " --- |" * len(rows[0]), *body])


def config_rows(results: Outcome, everything: bool) -> list[list[str]]:
    """A row per kernel, mode and tile: how its checks ended; only those with something wrong unless `everything`."""
    found: dict[tuple[str, str, str], list[Outcome]] = {}
    for outcome in (*results["numerics"], *results["hunt"]):
        case = outcome["case"]
        name = tile_name(case["tiles"][0]) if case["tiles"] else ""
        found.setdefault((case["op"], case["mode"], name), []).append(outcome)
    rows = [["kernel", "mode", "tile", "right", "bad", "worst error/allowed", "first bad"]]
    for key, outcomes in sorted(found.items()):
        bad = [o for o in outcomes if o["status"] not in ("right", "skipped")]
        if bad or everything:
            kinds = sorted({o["status"] for o in bad})
            count = f"{len(bad)} {'/'.join(kinds)}" if bad else "0"
            right = sum(o["status"] == "right" for o in outcomes)
            worst = max((o.get("excess", 0.0) for o in outcomes), default=0.0)
            rows.append([*key, str(right), count, f"{worst:.2g}", _first(bad[0]) if bad else ""])
    return rows


def _first(outcome: Outcome) -> str:
    case = outcome["case"]
    settings = f"{case['shape']} taps {case['taps']} stride {case['stride']} {case['activation']} seed {case['seed']}"
    return f"{settings} {outcome.get('note', '')[-80:]}".replace("\n", " ").replace("|", "/").strip()


def _dropped(results: Outcome) -> list[str]:
    """What was not timed though its checks passed, and failures of the timings themselves."""
    lines: list[str] = []
    for outcome in (*results["small"], *results["layers"], *results["compiled"]):
        place = f"{outcome['case']['op']} {outcome['case']['mode']} {outcome['case']['shape']}"
        if outcome["status"] not in ("timed", "skipped"):
            lines.append(f"{place}: {outcome['status']} {outcome.get('note', '')[-120:]}".replace("\n", " "))
        lines += [f"{place} {name}: {why[:120]}" for name, why in outcome.get("dropped", {}).items()]
        for direction in ("forward", "both"):
            for name, known in outcome.get(direction, {}).items():
                if "error" in known or "capture" in known:
                    lines.append(f"{place} {direction} {name}: {(known.get('error') or known['capture'])[:120]}")
    return lines


def report(results: Outcome, short: bool) -> str:
    """The tables, wrong configurations first; short: what fits into a device machine's answer."""
    known = results["facts"][0]
    rates = ", ".join(f"{m} {r / 1e12:.0f}" for m, r in known.get("flop_per_s", {}).items())
    copy = known.get("copy_bytes_per_s", math.nan) / 1e12
    title = f"{known.get('device', 'unknown device')}, torch {known.get('torch')}, triton {known.get('triton')}"
    title += f", driver {results['driver']}, commit {results['commit']}, {results['date']}, {results['seconds']:.0f} s"
    parts = [title, f"copy {copy:.2f} TB/s; matrix TFLOP/s: {rates}"]
    if DRY:
        parts.append("DRY RUN under the interpreter: the times below mean nothing.")
    for name in ("numerics", "hunt", "small", "layers", "compiled"):
        counts = [o["status"] for o in results[name]]
        told = ", ".join(f"{counts.count(kind)} {kind}" for kind in sorted(set(counts))) or "nothing ran"
        parts.append(f"{name}: {told}" + (f" ({results['errors'][name]})" if name in results["errors"] else ""))
    bad, dropped = config_rows(results, everything=not short), _dropped(results)
    limit = 12 if short else len(bad)
    if len(bad) > 1:
        parts += [
            "",
            _markdown(bad[: limit + 1]),
            f"... and {len(bad) - 1 - limit} more" if len(bad) > limit + 1 else "",
        ]
    else:
        parts += ["", "No configuration that was checked was wrong.", ""]
    parts += [f"- {line}" for line in (dropped[:6] if short else dropped)]
    parts += [f"- ... and {len(dropped) - 6} more dropped"] if short and len(dropped) > 6 else []
    for rows in (small_rows(results), layer_rows(results)):
        parts += ["", _markdown(rows)] if len(rows) > 1 else []
    return "\n".join(parts)


def _told(*command: str) -> str:
    """First line of what a program says, or "unknown"."""
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
        return answer.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=ROOT / "bench" / "results", help="folder for results.json, table.md"
    )
    parser.add_argument("--budget", type=float, default=450, help="seconds; what does not fit is skipped")
    parser.add_argument("--dry", action="store_true", help="on a CPU under the interpreter, tiny, no timings")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--deadline", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.child, options.deadline)
        return
    if not (DRY or torch.cuda.is_available()):
        parser.error("no GPU here; --dry runs without one")
    begin = time.time()
    options.out.mkdir(parents=True, exist_ok=True)
    results: Outcome = {name: [] for name in ("facts", "numerics", "hunt", "small", "layers", "compiled")}
    results |= {"facts": [{}], "errors": {}, "seconds": 0.0, "dry": DRY}
    results |= {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _told("git", "rev-parse", "--short", "HEAD"),
        "driver": _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }

    def checked() -> list[Outcome]:
        return results["numerics"] + results["hunt"]

    def hunters() -> Iterator[list[Case]]:
        capability = round(10 * float(results["facts"][0].get("capability", 8.0)))
        seeds, count = (2, 3) if DRY else (14, 60)
        return (hunted(seed, count, capability) for seed in range(1, seeds + 1))

    # each part may use the time up to this share of the budget
    parts: list[tuple[str, float, Callable[[float], list[Outcome]]]] = [
        ("facts", 0.10, lambda until: work([Case("facts")], until)),
        ("numerics", 0.38, lambda until: work_together(numeric_groups(), until)),
        ("hunt", 0.48, lambda until: work_together(hunters(), until)),
        ("small", 0.58, lambda until: work(small_cases(checked()), until)),
        ("layers", 0.82, lambda until: work(layer_cases(checked()), until)),
        ("compiled", 0.96, lambda until: work(compile_cases(results["layers"]), until)),
    ]
    for name, share, part in parts:
        try:
            results[name] = part(begin + share * options.budget)
        except Exception as error:  # the other parts are worth having all the same
            results["errors"][name] = _named(error)
        results["seconds"] = time.time() - begin
        print(f"{name}: {len(results[name])} cases, {results['seconds']:.0f} s", flush=True)
        (options.out / "results.json").write_text(json.dumps(results, indent=1))
    (options.out / "table.md").write_text(report(results, short=False) + "\n")
    print(report(results, short=True)[: LAST - 500])


if __name__ == "__main__":
    main()
