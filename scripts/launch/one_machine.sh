#!/usr/bin/env bash
# A run on all accelerators of this machine, started again by itself when it fails.
#
#   scripts/launch/one_machine.sh --recipe FILE [--overlay FILE ...] [section.key=value ...]
#
# NPROC_PER_NODE   ranks; by default one for each GPU, or 2 without any
# MAX_RESTARTS     how often torchrun starts the ranks again after a failure; 3 by default
# SAVE_SECONDS     what a step and a save take at most; SIGTERM leaves the ranks that long. 600 by default
# PYTHON           .venv/bin/python by default
set -euo pipefail
cd "$(dirname "$0")/../.."

gpus=$(nvidia-smi --list-gpus 2>/dev/null | wc -l) || gpus=0
ranks=${NPROC_PER_NODE:-$((gpus > 0 ? gpus : 2))}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

exec "${PYTHON:-.venv/bin/python}" -m torch.distributed.run \
    --standalone --nproc-per-node "$ranks" --max-restarts "${MAX_RESTARTS:-3}" \
    --shutdown-timeout "${SAVE_SECONDS:-600}" \
    scripts/pretrain.py "$@"
