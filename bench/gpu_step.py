"""Everything a borrowed GPU is asked about whole training steps, in one run of under eight minutes.

`PYTHONPATH=.:kernels python bench/gpu_step.py --out FOLDER`, with torch, triton, numpy and rich only; `--dry` runs the
same code on a CPU with tiny nets and no claims about time. Parts run in processes of their own, in the order of their
worth; what does not fit into the budget is skipped. FOLDER gets step.json, and the tables as step.md.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from fastbegan.config import ModelConfig, TrainConfig  # noqa: E402
from fastbegan.data.loader import Batching, Loader, PackedLoader, ResidentLoader  # noqa: E402
from fastbegan.device import pick_precision, set_backends  # noqa: E402
from fastbegan.measure import step as bench  # noqa: E402
from fastbegan.nets.models import build  # noqa: E402
from fastbegan.training.cost import step_cost  # noqa: E402
from fastbegan.training.graph import GraphedStep  # noqa: E402
from fastbegan.training.step import TrainStep  # noqa: E402

DRY = "--dry" in sys.argv
DEVICE = torch.device("cpu" if DRY else "cuda")
SIZES = [(32, 4)] if DRY else [(128, 128), (64, 64)]  # image size, n; batch 16
PRECISION = "float32" if DRY else "bf16"
MODES = ("textbook", "textbook+compile", "single-pass", "joint", "alternating", "single-pass+compile")
NEEDS = {64: 4.0, 128: 2.5}  # times the eager textbook step
# part -> share of the budget by whose end it is killed
PARTS = {"graph": 0.15, "loaders": 0.25, "ratios": 0.65, "profile": 0.85, "memory": 1.0}


def _step(size: int, filters: int, dtype: torch.dtype | None, **options: Any) -> tuple[TrainStep, Tensor, Tensor]:
    model, train = ModelConfig(size=size, filters=filters), TrainConfig(**options)
    real, z = bench.inputs(model, train, DEVICE)
    return TrainStep(*build(model, seed=0, device=DEVICE), train, dtype), real, z


def graph() -> Iterator[dict[str, Any]]:
    """Steps replayed from a graph against the same steps one by one: bit for bit, in every mode."""
    set_backends(PRECISION, deterministic=True)
    dtype = pick_precision(PRECISION, DEVICE)[1]
    for passes, updates in (("single-pass", "simultaneous"), ("joint", "simultaneous"), ("single-pass", "alternating")):
        steps, captured = [], []
        for enabled in (False, True):
            step, real, z = _step(*SIZES[-1], dtype, passes=passes, updates=updates)
            advance = GraphedStep(lambda step=step, real=real, z=z: step(real, z, z), DEVICE, enabled=enabled)
            for _ in range(8):
                advance()
            steps.append(step)
            captured.append(advance.captured)
        same = all(torch.equal(a, b) for a, b in zip(steps[0].parameters(), steps[1].parameters(), strict=True))
        yield {"passes": passes, "updates": updates, "captured": captured[1], "equal": same}


def loaders() -> Iterator[dict[str, Any]]:
    """Batches from the device's memory and by way of pinned memory, inside a graph, against those of a CPU."""
    images = np.random.default_rng(0).integers(0, 256, (70, 36, 36, 3), np.uint8)
    options: dict[str, Any] = {"batch_size": 16, "size": 32, "seed": 0, "jitter": 2}
    exact = PackedLoader(images, Batching(**options))
    for kind in (PackedLoader, ResidentLoader):
        loader = kind(images, Batching(**options, device=DEVICE))
        position, out = torch.zeros((), dtype=torch.int64, device=DEVICE), torch.empty(16, 3, 32, 32, device=DEVICE)
        loader.prepare(0)

        def work(loader: Loader = loader, out: Tensor = out, position: Tensor = position) -> None:
            out.copy_(loader.current(position))
            position.add_(16)

        advance, batches = GraphedStep(work, DEVICE), []
        for number in range(40):
            loader.prepare(16 * number)
            advance()
            batches.append(out.clone())  # nothing here waits for the device
        right = [torch.allclose(got.cpu(), exact.batch(16 * n), rtol=0, atol=1e-6) for n, got in enumerate(batches)]
        yield {"loader": kind.__name__, "captured": advance.captured, "right": sum(right), "of": len(right)}


def ratios() -> Iterator[dict[str, Any]]:
    """Every mode against the textbook, eager and compiled."""
    modes = [mode for mode in MODES if not (DRY and mode.endswith(bench.COMPILED))]
    for size, filters in SIZES:
        model, compiler = ModelConfig(size=size, filters=filters), None if DRY else "max-autotune"
        timed = bench.measure(model, TrainConfig(), modes, [PRECISION], DEVICE, compiler, 3 if DRY else 15)
        yield from ({"size": size, "filters": filters, **asdict(row)} for row in timed)


def profile() -> Iterator[dict[str, Any]]:
    """Where the time of a step goes, and how many launches it is, with and without a graph."""
    set_backends(PRECISION)
    dtype = pick_precision(PRECISION, DEVICE)[1]
    activities = [torch.profiler.ProfilerActivity.CPU] + ([] if DRY else [torch.profiler.ProfilerActivity.CUDA])
    for size, filters in SIZES:
        step, real, z = _step(size, filters, dtype)
        for enabled in (False, True):
            advance = GraphedStep(lambda step=step, real=real, z=z: step(real, z, z), DEVICE, enabled=enabled)
            for _ in range(5):
                advance()
            with torch.profiler.profile(activities=activities) as profiler:
                advance()
                if not DRY:
                    torch.cuda.synchronize()
            events = profiler.key_averages()
            kernels = [e for e in events if e.self_device_time_total > 0 and e.device_type.name == "CUDA"]
            total = sum(e.self_device_time_total for e in kernels)
            kernels.sort(key=lambda e: e.self_device_time_total, reverse=True)
            launches = {e.key: e.count for e in events if "Launch" in e.key}
            top = [
                {"kernel": e.key[:90], "calls": e.count, "us": e.self_device_time_total,
                 "share": e.self_device_time_total / total}
                for e in kernels[:25]
            ]  # fmt: skip
            ops = sum(e.count for e in events if e.key.startswith(("aten::", "fastbegan::")))
            cost = step_cost(ModelConfig(size=size, filters=filters), TrainConfig(), dtype)
            yield {
                "size": size, "filters": filters, "graph": enabled, "kernels": sum(e.count for e in kernels),
                "launches": launches, "device_us": total, "dispatched": ops, "flops": cost.flops, "top": top,
            }  # fmt: skip


def memory() -> Iterator[dict[str, Any]]:
    """Ten thousand steps: what the allocator holds at the end, and after the first hundred; and a log row's reading."""
    step, real, z = _step(*SIZES[-1], pick_precision(PRECISION, DEVICE)[1])
    advance = GraphedStep(lambda: step(real, z, z), DEVICE)
    held, steps, reading = [], 20 if DRY else 10_000, None
    for number in range(steps):
        advance()
        if number == steps // 2 - 1:
            reading = step.begin_reading()
        if number in (min(100, steps // 2), steps - 1) and not DRY:
            torch.cuda.synchronize()
            held.append((torch.cuda.memory_allocated(), torch.cuda.memory_reserved()))
    grew = bool(held) and held[0] != held[-1]
    assert reading is not None
    *_, count, _, _ = reading.values()
    read = count == steps // 2  # of the steps before it, though more were queued behind
    yield {"steps": steps, "held": held, "grew": grew, "finite": not step.found_bad.item(), "read": read}


def _verdicts(results: dict[str, Any]) -> list[tuple[str, bool]]:
    found = [
        (f"{row['passes']}, {row['updates']}: replayed equals stepped{'' if row['captured'] else ' (not captured)'}",
         row["equal"] and (row["captured"] or DRY))
        for row in results.get("graph", [])
    ]  # fmt: skip
    for size, _ in SIZES:
        ours = [row for row in results.get("ratios", []) if row["size"] == size and "textbook" not in row["mode"]]
        if ours and not DRY:
            best = max(ours, key=lambda row: row["ratio_eager"])
            found.append((f"{size} px: {best['mode']} {best['ratio_eager']:.2f}x eager, needs {NEEDS[size]}",
                          best["ratio_eager"] >= NEEDS[size]))  # fmt: skip
            if best["ratio_compile"]:
                text = f"{size} px: {best['mode']} {best['ratio_compile']:.2f}x torch.compile max-autotune, needs 1.6"
                found.append((text, best["ratio_compile"] >= 1.6))
    found += [
        (f"{row['loader']}: {row['right']} of {row['of']} batches are those of a CPU", row["right"] == row["of"])
        for row in results.get("loaders", [])
    ]
    if not DRY:
        found += [("10,000 steps without memory growth", not row["grew"]) for row in results.get("memory", [])]
    found += [("a log row's numbers are of the step it began at", row["read"]) for row in results.get("memory", [])]
    return found


def _report(results: dict[str, Any]) -> str:
    lines = [f"{'pass' if met else 'FAIL'}: {text}" for text, met in _verdicts(results)]
    for row in results.get("ratios", []):
        ratio = row["ratio_compile"]
        lines.append(
            f"{row['size']} px n {row['filters']} {row['mode']} {row['precision']}: {row['ms']:.3f} ms, "
            f"{row['images_per_second']:,.0f} images/s, {row['flops'] / row['ms'] / 1e9:.1f} TFLOP/s done, "
            f"{row['peak_bytes'] / 2**20:,.0f} MiB, {row['ratio_eager']:.2f}x eager"
            + (f", {ratio:.2f}x compiled" if ratio else "")
        )
    for row in results.get("profile", []):
        head = f"{row['size']} px n {row['filters']} {'graph' if row['graph'] else 'stepped'}"
        lines.append(f"{head}: {row['kernels']} kernels, {row['device_us']:.0f} us, {row['launches']}")
        if not row["graph"]:
            lines += [f"  {e['share']:6.1%} {e['us']:8.0f} us {e['calls']:4d} {e['kernel']}" for e in row["top"][:14]]
    return "\n".join([*lines, *(f"{part}: {error}" for part, error in results["errors"].items())])


def rows_of(printed: str) -> list[dict[str, Any]]:
    """The rows that a part came to; not one that was cut off."""
    rows: list[dict[str, Any]] = []
    for line in printed.splitlines():
        with contextlib.suppress(ValueError):
            rows += [json.loads(line)] if line.startswith("{") else []
    return rows


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--budget", type=float, default=450, help="seconds")
    parser.add_argument("--dry", action="store_true", help="on a CPU, tiny")
    parser.add_argument("--part", choices=PARTS, help="only this one, in this process; a row of JSON a line")
    options = parser.parse_args()
    if options.part:
        for row in globals()[options.part]():
            print("\n" + json.dumps(row), flush=True)  # as it comes: whoever ends this part keeps it
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    name = "cpu" if DRY else torch.cuda.get_device_name()
    results: dict[str, Any] = {"device": name, "torch": torch.__version__, "date": time.strftime("%F"), "errors": {}}
    begin = time.time()
    for part, share in PARTS.items():
        command = [sys.executable, __file__, "--part", part, *(["--dry"] if DRY else [])]
        left = max(1.0, begin + share * options.budget - time.time())
        try:
            done = subprocess.run(command, capture_output=True, timeout=left, check=False)
            printed = done.stdout
            if done.returncode:
                results["errors"][part] = done.stderr.decode(errors="replace").strip()[-600:]
        except subprocess.TimeoutExpired as ended:
            printed, results["errors"][part] = ended.stdout or b"", f"not done after {left:.0f} s"
        results[part] = rows_of(printed.decode(errors="replace"))
        print(f"{part}: {time.time() - begin:.0f} s", flush=True)
        (options.out / "step.json").write_text(json.dumps(results, indent=1))
    (options.out / "step.md").write_text(_report(results) + "\n")
    print(_report(results)[:11_000])
    return int(bool(results["errors"]) or not all(met for _, met in _verdicts(results)))


if __name__ == "__main__":
    sys.exit(main())
