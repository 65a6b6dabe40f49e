"""Commands on pages. What is light runs; of the rest, options and targets are checked, for the reason given here."""

from __future__ import annotations

import itertools
import re
import shlex
import subprocess
from pathlib import Path

from fastbegan import cli

from .processes import ROOT

RUN = ("sample", "info", "data", "bench plan", "bench report")
PARSED = {
    "train": "minutes to days",
    "doctor": "on a GPU it tries kernels; tests/test_doctor.py runs it",
    "evaluate": "a network for features; tests/test_evaluate.py runs it",
    "explore": "tests/test_explore.py runs it",
    "export": "tests/test_export.py runs it",
    "experiment": "minutes; tests/test_experiments.py runs each at another scale",
    "bench step": "minutes; tests/test_bench_step.py runs it",
    "bench record": "minutes; tests/test_bench_record.py runs it",
}
CHECKED = {
    "make": "it would test the tests; `make -n` finds the target",
    "pytest": "the same; the file must be there",
    "pip": "a package index is needed; files that it names must be there",
    "docker": "no daemon on test machines; the Dockerfile is linted",
    "sbatch": "Slurm is needed; the script is read by bash, its options by `fastbegan train`",
    "examples/torchrun.sh": "the same",
    "python": "a module or script must be there",
    "export": "",
    "source": "",
    ".ci/run": "it runs these tests",
}


def run(text: str) -> None:
    """Run or check each line of a snippet, in the current folder. Raises AssertionError or SystemExit if wrong."""
    for line in text.splitlines():
        words = [word for word in shlex.split(line, comments=True) if not re.match(r"^[A-Z_]+=", word)]
        if words:
            _run(line, words)


def _run(line: str, words: list[str]) -> None:
    name = words[0].removeprefix(".venv/bin/")
    if name == "fastbegan":
        _fastbegan(line, words[1:])
        return
    assert name in CHECKED, f"{line!r} begins with a command that this test does not know"
    if name == "make":
        targets = [word for word in words[1:] if "=" not in word]
        done = subprocess.run(["make", "-n", *words[1:]], cwd=ROOT, capture_output=True, text=True, check=False)
        assert targets and done.returncode == 0, done.stderr
    elif name in ("sbatch", "examples/torchrun.sh"):
        script, *options = words[1:] if name == "sbatch" else words
        subprocess.run(["bash", "-n", ROOT / script], check=True)
        cli._parse(["train", *options])
    elif name in ("pytest", "python"):
        module = words[words.index("-m") + 1] if "-m" in words else None
        files = [word for word in words[1:] if re.search(r"\.py$|/$|^tests/", word)]
        assert module or files, line
        assert all((ROOT / file).exists() for file in files), line
        if module and module not in ("pytest", "build"):
            path = ROOT / module.replace(".", "/")
            assert path.with_suffix(".py").exists() or (path / "__main__.py").exists(), line
    elif name == "pip":
        assert all(Path(word).exists() for before, word in itertools.pairwise(words) if before == "-c"), line


def _fastbegan(line: str, arguments: list[str]) -> None:
    name = " ".join(arguments[: 2 if arguments[0] == "bench" else 1])
    if name in RUN:
        assert cli.main(arguments) == 0, line
    elif arguments != ["--help"]:
        assert name in PARSED, line
        cli._parse([cli._expanded(argument) for argument in arguments])
