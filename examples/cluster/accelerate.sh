#!/usr/bin/env bash
# Compress and distil a model on all GPUs of one machine: bash accelerate.sh PARENT RUN DATA
# Without GPUs, PROCESSES=2 DEVICE=cpu takes two processes.
set -euo pipefail

parent=${1:?checkpoint folder or hub id}
run=${2:?folder of the run}
data=${3:?text: a file, a folder or a hub dataset}

processes=${PROCESSES:-$(nvidia-smi --list-gpus | wc -l)}
accelerate launch --multi_gpu --num_processes "$processes" --num_machines 1 --mixed_precision no --dynamo_backend no \
  --module layersmith compress "$parent" "$run" --data "$data" --params "${PARAMS:-0.7}" \
  --set "device=${DEVICE:-auto}" --set distillation.tokens="${TOKENS:-50000000}"
