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
# On a cluster without GPUs: sbatch --gpus-per-node=0 recipes/slurm.sh ...

set -u
text=$1 run=$2
shift 2
python=${BARDLET:-python3}
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
processes=${SLURM_GPUS_ON_NODE:-1}
[ "$processes" -gt 0 ] || processes=1
port=$((20000 + SLURM_JOB_ID % 10000)) # two jobs may share a machine

export SRUN_CPUS_PER_TASK=${SLURM_CPUS_PER_TASK:-1} # newer versions of srun ignore the other name
export OMP_NUM_THREADS=$((SRUN_CPUS_PER_TASK / processes))
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240   # seconds for the save, which torchrun would cut short after 30
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 # otherwise torchrun's restarts of several machines may hang
srun --kill-on-bad-exit=1 "$python" -m torch.distributed.run \
    --nnodes "$SLURM_JOB_NUM_NODES" --nproc-per-node "$processes" --max-restarts 3 \
    --rdzv-id "$SLURM_JOB_ID" --rdzv-backend c10d --rdzv-endpoint "$first:$port" \
    --rdzv-conf read_timeout=300 \
    -m bardlet train "$text" --out "$run" "$@" &
training=$!

requeue() {
    echo "out of time: saving, then queueing again"
    scancel --signal=TERM "$SLURM_JOB_ID.0"
    wait "$training" && exit # it had just finished
    scontrol requeue "$SLURM_JOB_ID"
}
trap requeue USR1
wait "$training"
