"""Under torchrun: seconds of an all-reduce over gloo, by its bytes; rank 0 prints them as JSON."""

from __future__ import annotations

import json
import time

import torch
import torch.distributed as dist

SIZES = [1 << power for power in (10, 14, 18, 20, 22, 24)]


def main() -> None:
    """The least of many, which other work on the machine does not reach; none counts before all ranks are there."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    found = {}
    for size in SIZES:
        values = torch.ones(size // 4)
        taken = []
        for _ in range(60):
            dist.barrier()
            begun = time.perf_counter()
            dist.all_reduce(values)
            taken.append(time.perf_counter() - begun)
        found[size] = min(taken)
    if dist.get_rank() == 0:
        print(json.dumps(found))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
