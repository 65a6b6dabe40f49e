"""Two machines in one: `python tests/helpers/two_nodes.py FOLDER` trains in two network namespaces, an address each.

One is cut off while they train and comes back: the ranks say who was lost, torchrun starts them again, and they go on
from the last checkpoint. Needs root, `ip`, and a kernel that allows namespaces: exit code 77 where they are not.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

ROOT = Path(__file__).parents[2]
NOT_HERE = 77
NET, PORT = "10.77.0", 29511
STEPS = 400
FLAGS = (
    f"--filters 4 --data faces:64 --batch-size 16 --steps {STEPS} --log-every 10 --sample-every 1000 --device cpu "
    "--checkpoint-every 10 --compile off --rank-timeout 20"
).split()


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True)


@contextmanager
def network(names: tuple[str, str]) -> Iterator[None]:
    """Two namespaces with an address each on one wire."""
    try:
        for name in names:
            _ip("netns", "add", name)
        one, two = names
        _ip("link", "add", "wire", "netns", one, "type", "veth", "peer", "name", "wire", "netns", two)
        for number, name in enumerate(names, 1):
            _ip("-n", name, "address", "add", f"{NET}.{number}/24", "dev", "wire")
            for link in ("lo", "wire"):
                _ip("-n", name, "link", "set", link, "up")
        yield
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def start(number: int, name: str, out: Path, log: Path) -> subprocess.Popen[bytes]:
    """torchrun on one of the machines, a rank on each."""
    command = ["ip", "netns", "exec", name, sys.executable, "-m", "torch.distributed.run", "--nnodes", "2"]
    command += ["--nproc-per-node", "1", "--rdzv-backend", "c10d", "--rdzv-endpoint", f"{NET}.1:{PORT}"]
    host = int(number == 1)  # the name of this machine has no address in here
    conf = f"is_host={host},join_timeout=600,close_timeout=5,keep_alive_interval=2"
    command += ["--rdzv-id", "two", "--rdzv-conf", conf]
    command += ["--local-addr", f"{NET}.{number}", "--max-restarts", "3", "-m", "fastbegan", "train"]
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = {**os.environ, "PYTHONPATH": paths, "GLOO_SOCKET_IFNAME": "wire", "OMP_NUM_THREADS": "1"}
    with log.open("ab") as file:
        return subprocess.Popen(
            [*command, *FLAGS, "--out", str(out)], env=environment, stdout=file, stderr=file, start_new_session=True
        )


def wait(what: str, condition: Callable[[], object], seconds: float) -> None:
    """Wait until it holds; raises AssertionError where it does not in time."""
    begun = time.monotonic()
    while not condition():
        assert time.monotonic() - begun < seconds, f"{what}: not within {seconds:g} seconds"
        time.sleep(0.2)
    print(f"{what} after {time.monotonic() - begun:.1f} s", flush=True)


def _text(log: Path) -> str:
    return log.read_text(errors="replace") if log.exists() else ""


def main(folder: Path) -> None:
    """Train, cut off, bring back, and finish."""
    names = (f"fastbegan-{os.getpid()}-1", f"fastbegan-{os.getpid()}-2")
    out, logs = folder / "run", [folder / "node1.log", folder / "node2.log"]
    checkpoints = out / "checkpoints"

    def reached() -> int:
        return max((int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal()), default=0)

    with network(names), ExitStack() as stack:

        def node(number: int) -> subprocess.Popen[bytes]:
            process = start(number, names[number - 1], out, logs[number - 1])
            stack.callback(process.wait)
            stack.callback(subprocess.run, ["pkill", "-KILL", "-s", str(process.pid)], check=False)
            return process

        first, second = node(1), node(2)
        wait("both train", lambda: reached() >= 10, 120)
        _ip("-n", names[1], "link", "set", "wire", "down")
        wait("the lost one is named", lambda: "error: rank 1 (" in _text(logs[0]), 100)
        wait("it noticed itself", lambda: "error: rank 1: no answer" in _text(logs[1]), 100)
        cut_at = reached()
        _ip("-n", names[1], "link", "set", "wire", "up")

        def goes_on() -> bool:
            nonlocal second
            if second.poll() is not None:  # torchrun there had given up: as who looks after that machine would
                second = node(2)
            return f"continued at step {cut_at:,}" in _text(logs[0]) + _text(logs[1])

        wait("they go on", goes_on, 300)
        wait("both end", lambda: first.poll() is not None and second.poll() is not None, 200)
        assert first.returncode == second.returncode == 0, (first.returncode, second.returncode)
        assert reached() == STEPS
        print(f"cut off after a checkpoint of step {cut_at}, finished {STEPS}")


def allowed() -> str | None:
    """Why there can be no namespaces here; None where there can."""
    if not shutil.which("ip"):
        return "there is no `ip` (Debian's iproute2)"
    name = f"fastbegan-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if made.returncode:
        return f"namespaces are not allowed: {made.stderr.strip()}"
    wire = ["ip", "link", "add", "wire", "netns", name, "type", "veth", "peer", "name", "other", "netns", name]
    linked = subprocess.run(wire, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)
    return f"there are no virtual links: {linked.stderr.strip()}" if linked.returncode else None


if __name__ == "__main__":
    if reason := allowed():
        print(f"two machines cannot be made here: {reason}")
        sys.exit(NOT_HERE)
    main(Path(sys.argv[1]))
