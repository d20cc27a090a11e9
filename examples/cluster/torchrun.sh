#!/usr/bin/env bash
# Compress and distil a model on all GPUs of one machine: bash torchrun.sh PARENT RUN DATA
set -euo pipefail

parent=${1:?checkpoint folder or hub id}
run=${2:?folder of the run}
data=${3:?text: a file, a folder or a hub dataset}

# Statistics, library and scores run on the first GPU; training is divided among all of them.
torchrun --standalone --nproc-per-node="${GPUS:-gpu}" \
  -m layersmith compress "$parent" "$run" --data "$data" --params "${PARAMS:-0.7}" \
  --set distillation.tokens="${TOKENS:-50000000}"
