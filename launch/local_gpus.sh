#!/usr/bin/env bash
# Trains on all GPUs of this machine. One process sees them all; the mesh divides the work.
#
#   CONFIG=configs/vit_imagenet.py launch/local_gpus.sh [--dry-run] [--config.KEY=VALUE ...]
#
# CUDA_VISIBLE_DEVICES=0,1 chooses among them. --dry-run prints the command and runs nothing.
# Set CONFIG, WORKDIR and PYTHON to change what runs, where it writes, and with what.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=${CONFIG:-configs/lm_c4.py}
WORKDIR=${WORKDIR:-runs/$(basename "$CONFIG" .py)}
PYTHON=${PYTHON:-.venv/bin/python}

dry_run=false
given=()
for argument in "$@"; do
  if [[ $argument == --dry-run ]]; then
    dry_run=true
  else
    given+=("$argument")
  fi
done
set -- ${given[@]+"${given[@]}"}

command=("$PYTHON" -m train "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
if $dry_run; then
  printf '%q ' "${command[@]}"
  echo
  exit
fi

if ! nvidia-smi --list-gpus; then
  echo "error: nvidia-smi finds no GPU; on a CPU run: ${command[*]}" >&2
  exit 2
fi
exec "${command[@]}"
