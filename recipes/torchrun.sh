#!/bin/bash
# A training on several machines without a scheduler. Start it on each of them, with the same arguments:
#
#     bash recipes/torchrun.sh MACHINES FIRST_MACHINE my.txt runs/mine --steps 100000
#
# FIRST_MACHINE is the name or address of one of them, which the others reach. Text and run lie on a disk that all share.
# If a process dies or the network fails, all are started again and go on from the last checkpoint, up to ten times.
# If a machine dies, the others wait an hour for it: start the same command on it again, and on any other where it ended.

set -eu
machines=$1 first=$2 text=$3 run=$4
shift 4
python=${BARDLET:-python3}
processes=${PROCESSES:-$(nvidia-smi --list-gpus 2> /dev/null | wc -l)}
[ "$processes" -gt 0 ] || processes=1

export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / processes))}
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1  # otherwise torchrun cannot let a machine join again
exec "$python" -m torch.distributed.run \
    --nnodes "$machines" --nproc-per-node "$processes" --max-restarts 10 \
    --rdzv-id "$(basename "$run")" --rdzv-backend c10d --rdzv-endpoint "$first:29500" \
    --rdzv-conf join_timeout=3600,read_timeout=300 \
    -m bardlet train "$text" --out "$run" "$@"
