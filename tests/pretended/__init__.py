"""Pretended CUDA devices: torch believes in GPUs whose tensors lie in the CPU's memory, and Triton is interpreted.

`site/sitecustomize.py` installs them in every process that has that folder on PYTHONPATH and PRETENDED_GPUS set. The
patches are process-wide, so tests run what they examine in processes of its own (`running`), never in pytest's.

| variable | |
| --- | --- |
| PRETENDED_GPUS | a capability for each card: "80", "60", "80,61"; unset: nothing is installed |
| PRETENDED_MEMORY | MiB of a card, one for all or one for each: allocations beyond raise OutOfMemoryError |
| PRETENDED_ARCHES | what the wheel has code for: "sm_80,sm_90"; unset: all cards. Others fail as they do |
| PRETENDED_TUNING | no children, no stopwatch: see `tuning`; unset: kernels are chosen as on a GPU (minutes) |
| PRETENDED_TRUST | 1: kernels are not compared with float64 |
| PRETENDED_LATENCY | how often an event's query says "not yet"; 1 |
| PRETENDED_REPORT | a file that gets a line of JSON from each process that ends; unset: nothing is written |

Emulated is what the host's code can do wrong:
- which device a tensor is on, and what may not be mixed; the current device of each thread;
- order: streams and events have vector clocks; races, memory freed too early, pinned memory changed too soon;
- waiting: whatever lets the host wait, and each copy from it, is counted by place;
- CUDA graphs: a capture records, is put back, and refuses what CUDA refuses; replays run on the same memory;
- want of memory, by what tensors hold.

Not emulated: autograd's threads (backward runs in the caller's), cuDNN and cuBLAS (their choice, workspaces, search),
NCCL (gloo stands in, in graphs too), DALI, torch.compile for a GPU, Triton's compiler, torch.Stream and torch.Event,
races between two streams of one capture, what kernels reach through addresses in a table, and the allocator's layout: a
capture's memory counts as if nothing of it were used twice.
"""
