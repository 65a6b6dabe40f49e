#!/usr/bin/env bash
#SBATCH --job-name=fastbegan
#SBATCH --nodes=4
#SBATCH --ntasks-per-node=1          # one torchrun per machine, which starts a rank per GPU
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120          # SIGTERM to this script two minutes before the end;
#SBATCH --requeue                    # then the job is queued again, as after a preemption
#SBATCH --open-mode=append
# sbatch examples/slurm.sh --preset paper-128 --data FACES.pack --batch-size 512 --scaling sqrt --out RUNS/faces
# The run folder has to be on a shared file system; the images may be local to each machine.
set -uo pipefail
head=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
stopped=

srun --cpus-per-task "${SLURM_CPUS_PER_TASK:-1}" torchrun --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 3 \
    --rdzv-backend c10d --rdzv-endpoint "$head:29500" --rdzv-id "$SLURM_JOB_ID" \
    -m fastbegan train "$@" &
srun=$!
# on SIGTERM the ranks agree on a step, write a checkpoint and end
trap 'stopped=1; kill -TERM "$srun"' TERM
while kill -0 "$srun" 2>/dev/null; do
    wait "$srun" # until a signal to this script
done
wait "$srun"
code=$?
if [ "$stopped" ]; then
    scontrol requeue "$SLURM_JOB_ID"
    exit 0
fi
exit "$code"
