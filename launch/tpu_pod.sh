#!/usr/bin/env bash
# Trains on all hosts of a TPU VM slice, over gcloud.
#
#   export TPU=my-slice ZONE=us-east5-a SHARE=10.0.0.2:/share
#   launch/tpu_pod.sh install                        copies this commit, installs it, mounts SHARE
#   launch/tpu_pod.sh train [--config.KEY=VALUE ...] trains; again: goes on from the last checkpoint
#   launch/tpu_pod.sh stop                           ends the training on all hosts, saved: code 75
#   launch/tpu_pod.sh --dry-run train                prints the commands and runs nothing
#
# TPU is a slice that exists (gcloud compute tpus tpu-vm create, or a queued resource), ZONE its
# zone. SHARE is an NFS export that its network reaches, such as a Filestore share: the run's folder
# must be one that all hosts see, and a bucket is no folder (no appending, no renaming). It is
# mounted at /mnt/share; prepared datasets are looked for in /mnt/share/tensorflow_datasets.
# Set CONFIG and WORKDIR to change what runs and where it writes.
set -euo pipefail
cd "$(dirname "$0")/.."

CONFIG=${CONFIG:-configs/lm_c4.py}
WORKDIR=${WORKDIR:-/mnt/share/runs/$(basename "$CONFIG" .py)}
: "${TPU:?set TPU to the name of the slice}" "${ZONE:?set ZONE to its zone}"

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
action=${1:-}
shift || true

run() {
  if $dry_run; then
    printf '%q ' "$@"
    echo
  else
    "$@"
  fi
}

on_all() {
  run gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="$1"
}

case $action in
  install)
    : "${SHARE:?set SHARE to HOST:/EXPORT of an NFS share}"
    run mkdir -p build
    run git archive --format=tar.gz --output=build/emoe_jax.tar.gz HEAD
    run gcloud compute tpus tpu-vm scp build/emoe_jax.tar.gz "$TPU:" --zone="$ZONE" --worker=all
    # uv brings a Python that is new enough; TPU VM images come with an older one.
    on_all "set -e
rm -rf emoe_jax && mkdir emoe_jax && tar -xzf emoe_jax.tar.gz -C emoe_jax && cd emoe_jax
python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.12 .venv
python3 -m uv pip install --quiet --python .venv/bin/python --editable '.[train,tpu]'
sudo apt-get install --quiet --yes nfs-common
sudo mkdir -p /mnt/share
mountpoint -q /mnt/share || sudo mount -t nfs '$SHARE' /mnt/share
sudo chmod 1777 /mnt/share"
    ;;
  train)
    # Every host finds the others by itself: see train/cluster.py.
    command=(.venv/bin/python -m train "--config=$CONFIG" "--workdir=$WORKDIR" "$@")
    on_all "cd emoe_jax && TFDS_DATA_DIR=/mnt/share/tensorflow_datasets \
$(printf '%q ' "${command[@]}")"
    ;;
  stop)
    # The brackets keep the pattern from finding its own shell.
    on_all "pkill -f '[p]ython -m train' || true"
    ;;
  *)
    echo "error: '$action' is none of install, train, stop" >&2
    exit 2
    ;;
esac
