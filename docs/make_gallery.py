"""Copy the reports of experiments/*-demo to docs/gallery/ and write its first page: python docs/make_gallery.py."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
GALLERY, SOURCE = HERE / "gallery", HERE.parent / "experiments"
RUNS = ("demo-64", "orl")  # pages that docs/make_run_pages.py makes
ORDER = ("speed", "diversity", "continuity", "convergence", "unbalanced", "scores", "ablation", "nearest")
HEAD = """# Gallery

Two runs; a race of three ways to train; the experiments of the paper's section 4 at demo scale; and two more. Each is
made by the one command above its picture. The commands need what `.venv/bin/pip install -c constraints.txt -e
'.[eval]'` adds to `make venv`. `make experiments` does all experiments, and `make gallery` makes these pages. Each link
leads to the whole report, with all figures; beside it lies `results.json`.

What demo scale shows is which way things go: nets of a few hundred thousand parameters, 32 pixels, minutes on two cores
instead of days on four GPUs. It does not show how good a BEGAN becomes: drawn faces are easier than photographs, which
have texture and vary in more ways. `--scale paper` takes the paper's nets and lengths, with `--data` for your images;
nobody has run that with this code yet."""


def copy(name: str) -> None:
    """Copy an experiment's report, results.json and pictures."""
    source, target = SOURCE / f"{name}-demo", GALLERY / name
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    report = (source / "report.md").read_text(encoding="utf-8")
    for file in {"report.md", "results.json", *re.findall(r"\]\(([\w.-]+)\)", report)}:
        shutil.copyfile(source / file, target / file)


def section(name: str) -> str:
    """The section of an experiment on the first page: its command, first pictures, checks and findings."""
    report = (GALLERY / name / "report.md").read_text(encoding="utf-8")
    results: dict[str, Any] = json.loads((GALLERY / name / "results.json").read_text(encoding="utf-8"))
    title = report.partition("\n")[0].removeprefix("# ")
    machine, settings = results["machine"], results["settings"]
    cores = "1 core" if machine["cores"] == 1 else f"{machine['cores']} cores"
    minutes = f"{results['seconds'] / 60:.1f} minutes on {machine['device']} ({cores})"
    pictures = re.findall(r"!\[(.*?)\]\((.*?)\)", report)
    first = [(caption, file) for caption, file in pictures if file[:6] == pictures[0][1][:6]]  # samples-1, samples-2
    lines = [f"## [{title}]({name}/report.md)", f"```sh\n{results['command']}\n```"]
    lines.append(f"Seed {settings['seed']}, {minutes}, {machine['date']}.")
    lines += [f"![{caption}]({name}/{file})" for caption, file in first]
    checks = []
    for check in results["checks"]:
        verdict = "Holds" if check["holds"] else "**Does not hold**"
        checks.append(f"- {verdict}: {check['expected']}. Found: {check['found']}.")
    checks += [f"- {finding[:1].upper()}{finding[1:]}." for finding in results.get("findings", ())]
    return "\n\n".join([*lines, "\n".join(checks)])


def page() -> str:
    """The first page, made from the reports in the gallery."""
    return "\n\n".join([HEAD, *(section(name) for name in (*RUNS, *ORDER) if (GALLERY / name).is_dir())]) + "\n"


if __name__ == "__main__":
    if missing := [name for name in ORDER if not (SOURCE / f"{name}-demo" / "results.json").exists()]:
        print(f"error: {SOURCE} has no finished {', '.join(missing)}; make experiments first", file=sys.stderr)
        sys.exit(2)
    for name in ORDER:
        copy(name)
    (GALLERY / "README.md").write_text(page(), encoding="utf-8")
