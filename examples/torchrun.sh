#!/usr/bin/env bash
# Trains on all GPUs of this machine, or with PROCESSES=N on N ranks. Without a GPU: on the CPU, a rank per core.
#   examples/torchrun.sh --preset paper-64 --data PHOTOS --batch-size 128 --scaling sqrt --out runs/faces
# On several machines, run on each: NODES=4 HEAD=first-machine:29500 examples/torchrun.sh ...
# A rank that dies or hangs ends all ranks. They restart from the last checkpoint, up to RESTARTS times.
set -euo pipefail
: "${NODES:=1}" "${HEAD:=localhost:0}" "${RESTARTS:=3}" "${PROCESSES:=auto}"
exec torchrun --nnodes "$NODES" --nproc-per-node "$PROCESSES" --max-restarts "$RESTARTS" \
    --rdzv-backend c10d --rdzv-endpoint "$HEAD" --rdzv-id "${RUN_ID:-fastbegan}" \
    -m fastbegan train "$@"
