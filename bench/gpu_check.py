"""Everything a borrowed GPU is asked, in one run of under eight minutes: facts, numerics, a hunt, timings, a table.

`PYTHONPATH=.:kernels python bench/gpu_check.py --out FOLDER`, with torch, triton and numpy only; `--dry` runs the same
code on a CPU under Triton's interpreter, with tiny shapes and no claims about time.

This process never touches the GPU; its children do (`bench.gpu_children`). Layers that choose their kernels by
measurement keep what they find in a folder of this run's own, and `kernels.json` goes to FOLDER with the tables. The
exit status is 1 where anything was wrong or failed, which a missed target or a part without time left is not.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from pathlib import Path

import torch

from bench.gpu_cases import CHANNELS, DRY, MODES, SAMPLES, Case, Outcome, hunted, named, numeric_groups
from bench.gpu_children import ROOT, work, work_together
from bench.gpu_report import PARTS, failures, report
from bench.gpu_timed_cases import compile_cases, layer_cases, small_cases, stage_cases

LAST = 12_000  # characters of output that a device machine returns
Part = tuple[str, float, Callable[[float], list[Outcome]]]


def _told(*command: str) -> str:
    """First line of what a program says, or "unknown"."""
    try:
        answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=20, check=True).stdout
        return answer.strip().splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def _empty_results() -> Outcome:
    return {
        "facts": [{"status": "skipped"}], **{name: [] for name in PARTS}, "errors": {}, "seconds": 0.0, "dry": DRY,
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": _told("git", "rev-parse", "--short", "HEAD"),
        "driver": _told("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
    }  # fmt: skip


def _hunters(capability: int) -> Iterator[list[Case]]:
    seeds, count = (2, 6) if DRY else (14, 40)
    return (hunted(seed, count, capability) for seed in range(1, seeds + 1))


def _choices() -> list[Case]:
    """A layer, its gradient and a kernel without a product, chosen as a user's first run does it."""
    side = 4 if DRY else 32
    layer = Case("tuning", "up", MODES[0], (SAMPLES, CHANNELS[0], side, side, CHANNELS[0]), needs=0 if DRY else 15)
    gradient = Case("tuning", "up", MODES[0], layer.shape, backward=True, needs=layer.needs)
    return [layer, *([] if DRY else [gradient]), Case("tuning", "normalize_images", MODES[0], needs=layer.needs)]


def _parts(results: Outcome) -> list[Part]:
    """Name, the share of the budget up to which it may use the time, and what it does until then."""

    def checked() -> list[Outcome]:
        return results["numerics"] + results["hunt"]

    def capability() -> int:
        return results["facts"][0].get("capability", 90 if DRY else 80)

    return [
        ("facts", 0.06, lambda until: work([Case("facts")], until)),
        ("numerics", 0.36, lambda until: work_together(numeric_groups(capability()), until)),
        ("hunt", 0.44, lambda until: work_together(_hunters(capability()), until)),
        ("tuning", 0.50, lambda until: work(_choices(), until)),
        ("small", 0.58, lambda until: work(small_cases(checked()), until)),
        ("layers", 0.80, lambda until: work(layer_cases(checked(), capability()), until)),
        ("stages", 0.86, lambda until: work(stage_cases(checked(), capability()), until)),
        ("compiled", 0.96, lambda until: work(compile_cases(results["layers"] + results["stages"]), until)),
    ]


def run(out: Path, budget: float) -> Outcome:
    """All parts one after another; results are on disk after each."""
    begin, results = time.time(), _empty_results()
    for name, share, part in _parts(results):
        try:
            results[name] = part(begin + share * budget)
        except Exception as error:  # the other parts are worth having all the same
            results["errors"][name] = named(error)
        results["seconds"] = time.time() - begin
        print(f"{name}: {len(results[name])} cases, {results['seconds']:.0f} s", flush=True)
        (out / "results.json").write_text(json.dumps(results, indent=1))
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results_folder = ROOT / "bench" / "results"
    parser.add_argument("--out", type=Path, default=results_folder, help="folder for the tables and all results")
    parser.add_argument("--budget", type=float, default=450, help="seconds; what does not fit is skipped")
    parser.add_argument("--dry", action="store_true", help="on a CPU under the interpreter, tiny, no timings")
    options = parser.parse_args()
    if not (DRY or torch.cuda.is_available()):
        parser.error("no GPU here; --dry runs without one")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["FASTBEGAN_CACHE"] = cache  # of this run's own, so that nothing stale is read
        results = run(options.out, options.budget)
        if (kept := Path(cache) / "kernels.json").exists():
            shutil.copyfile(kept, options.out / "kernels.json")
    (options.out / "table.md").write_text(report(results, short=False) + "\n")
    print(report(results, short=True)[: LAST - 500])
    return int(failures(results) > 0)


if __name__ == "__main__":
    sys.exit(main())
