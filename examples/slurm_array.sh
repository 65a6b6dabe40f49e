#!/usr/bin/env bash
#SBATCH --job-name=fastbegan-array
#SBATCH --array=0-8                  # three gammas times three seeds
#SBATCH --gpus=1
#SBATCH --cpus-per-task=8
#SBATCH --time=24:00:00
#SBATCH --signal=B:TERM@120          # the run writes a checkpoint and ends with the code below;
#SBATCH --requeue                    # then the task is queued again, and goes on
#SBATCH --open-mode=append
# sbatch examples/slurm_array.sh --preset paper-64 --data FACES.pack
# OUT=RUNS GAMMAS="0.4 0.6" SEEDS="0 1" sbatch --array=0-3 examples/slurm_array.sh ...
set -uo pipefail
read -ra gammas <<<"${GAMMAS:-0.3 0.5 0.7}"
read -ra seeds <<<"${SEEDS:-0 1 2}"
task=${SLURM_ARRAY_TASK_ID:-0} requeue=100 stopped= run=
gamma=${gammas[task / ${#seeds[@]}]} seed=${seeds[task % ${#seeds[@]}]}

trap 'stopped=1; [ -z "$run" ] || kill -TERM "$run"' TERM
fastbegan train "$@" --gamma "$gamma" --seed "$seed" --out "${OUT:-runs}/gamma-$gamma-seed-$seed" \
    --requeue-code "$requeue" &
run=$!
while kill -0 "$run" 2>/dev/null; do
    wait "$run" # until a signal to this script
done
wait "$run"
code=$?
# a run that is stopped while it starts ends with 130 or 143
if [ "$code" = "$requeue" ] || { [ "$stopped" ] && [ "$code" -ge 128 ]; }; then
    scontrol requeue "${SLURM_ARRAY_JOB_ID:-}_$task"
    exit 0
fi
exit "$code"
