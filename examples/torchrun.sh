#!/usr/bin/env bash
# All GPUs of this machine, or with PROCESSES=N as many ranks (without a GPU: on its CPU, one a core).
#   examples/torchrun.sh --preset paper-64 --data PHOTOS --batch-size 128 --scaling sqrt --out runs/faces
# On several machines, on each: NODES=4 HEAD=first-machine:29500 examples/torchrun.sh ...
# A rank that dies or hangs ends all; they start again, up to RESTARTS times, from the last checkpoint.
set -euo pipefail
: "${NODES:=1}" "${HEAD:=localhost:0}" "${RESTARTS:=3}" "${PROCESSES:=auto}"
exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" --max-restarts "$RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-fastbegan}" \
    -m fastbegan train "$@"
