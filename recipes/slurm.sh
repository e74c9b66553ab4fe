#!/bin/bash
# A training on several machines of a Slurm cluster. It saves and queues itself again when its time is over, and goes on.
#
#     sbatch recipes/slurm.sh my.txt runs/mine --steps 100000
#
# Text and run must lie on a disk that all machines share. Install bardlet there, too: set BARDLET to its Python.
#SBATCH --job-name=bardlet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=64
#SBATCH --time=04:00:00
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:USR1@300
# Five minutes before the end, Slurm signals this script, which passes SIGTERM on: bardlet saves and exits with code 143.

set -u
text=$1 run=$2
shift 2
python=${BARDLET:-python3}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${SLURM_GPUS_ON_NODE:-1}

export OMP_NUM_THREADS=$((${SLURM_CPUS_PER_TASK:-1} / processes))
srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    -m bardlet train "$text" --out "$run" "$@" &
training=$!

requeue() {
    echo "out of time: saving, then queueing again"
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$training"
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1
wait "$training"
