"""Write fastbegan_kernels as a repository of Hugging Face's kernel hub: python kernels/make_hub_folder.py OUT

OUT/build/torch-cpu and OUT/build/torch-cuda are what `kernels.get_local_kernel(OUT)` chooses from. Each holds the
package as it is here, but for the namespace of its ops: the hub loads several versions into one process, so ops are
`torch.ops.ID`, with an ID that is made from the source.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
from pathlib import Path

SOURCE = Path(__file__).with_name("fastbegan_kernels")
VERSION = 0  # the hub's number for what may still change; 1 once the kernels have run on GPUs
BACKENDS = ("cpu", "cuda")
INIT = f'''"""{SOURCE.name}, as the kernel hub loads it."""

from .{SOURCE.name} import *
from .{SOURCE.name} import __all__, __doc__
'''


def make(out: Path) -> None:
    """Write all variants below `out`. Raises FileExistsError where it holds a build already."""
    (out / "build").mkdir(parents=True)
    for backend in BACKENDS:
        _make_variant(out / "build" / f"torch-{backend}", backend)


def _make_variant(folder: Path, backend: str) -> None:
    sources = {path.relative_to(SOURCE.parent).as_posix(): path.read_text(encoding="utf-8") for path in _files()}
    digest = hashlib.sha256(json.dumps(sources, sort_keys=True).encode()).hexdigest()
    unique = f"_{SOURCE.name}_{backend}_{digest[:7]}"
    # the package keeps its own folder and name, so that trials find it with -m in a process of their own
    files = {"__init__.py": INIT} | {name: _renamed(text, unique) for name, text in sources.items()}
    for name, text in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(text.encode())
    hashes = {name: base64.b64encode(hashlib.sha256(files[name].encode()).digest()).decode() for name in sorted(files)}
    metadata = {
        "id": unique,
        "name": SOURCE.name.replace("_", "-"),
        "version": VERSION,
        "license": "apache-2.0",
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": hashes},
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def _files() -> list[Path]:
    return sorted([*SOURCE.rglob("*.py"), SOURCE / "py.typed"])


def _renamed(text: str, unique: str) -> str:
    return re.sub(r"\bfastbegan::|(?<=torch\.ops\.)fastbegan\b", lambda m: m[0].replace("fastbegan", unique), text)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(__doc__)
    try:
        make(Path(sys.argv[1]))
    except FileExistsError as error:
        sys.exit(f"error: {error.filename} exists; accepted: a folder without a build")
