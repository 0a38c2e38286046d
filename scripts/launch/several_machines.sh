#!/usr/bin/env bash
# One machine's part of a run on several. Start the same command on every machine:
#
#   NODES=4 RENDEZVOUS=first-machine:29400 scripts/launch/several_machines.sh --recipe FILE [section.key=value ...]
#
# NODES            machines of the run
# RENDEZVOUS       host:port of one of them, which the others can reach
# RUN_ID           tells runs with the same rendezvous apart; "bridge" by default
# NPROC_PER_NODE   ranks of each machine; by default one for each GPU, or 2 without any
# MAX_RESTARTS     how often the ranks of all machines are started again after a failure; 3 by default
# SAVE_SECONDS     what a step and a save take at most; SIGTERM leaves the ranks that long. 600 by default
# PYTHON           .venv/bin/python by default
set -euo pipefail
cd "$(dirname "$0")/../.."

: "${NODES:?set NODES to the number of machines}"
: "${RENDEZVOUS:?set RENDEZVOUS to host:port of one of the machines}"
gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --nnodes "$NODES" --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" \
    --rdzv-backend c10d --rdzv-endpoint "$RENDEZVOUS" --rdzv-id "${RUN_ID:-bridge}" \
    --shutdown-timeout "${SAVE_SECONDS:-600}" \
    scripts/pretrain.py "$@"
