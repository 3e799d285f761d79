#!/usr/bin/env bash
# The study of docs/routing.md: four tasks, two shapes of the experts, every router tuned on a seed
# of its own, in the environment that README makes. Some twelve hours on two cores; stopped and
# started again it goes on where it was.
#
#     docs/studies/study.sh FOLDER [CELL...]
#
# FOLDER takes the runs; CELL is TASK_SHAPE, such as fashion_e32, and all of them if none is named.
set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,8p' "$0" | cut -c3- >&2
  exit 2
fi
folder=$(realpath -m "$1")
shift
cd "$(dirname "$(realpath "$0")")/../.."
cells=("$@")
if [ ${#cells[@]} -eq 0 ]; then
  cells=({fashion,sotu,bytes,shakespeare}_e32 {fashion,sotu,bytes,shakespeare}_e8)
fi

for cell in "${cells[@]}"; do
  if ! [[ $cell =~ ^(fashion|sotu|bytes|shakespeare)_(e8|e32)$ ]]; then
    echo "$cell: a cell is fashion, sotu, bytes or shakespeare, _, and e8 or e32" >&2
    exit 2
  fi
done

seeds=5
short=(--config.steps=300 --config.optim.warmup=30 --config.eval_every=150 --config.settle=100
  --config.checkpoint.every=300)
text=(--config.model.width=128 --config.data.sequence_length=256 --config.batch=8)
routers=whitened,softmax_offset,loss_free,switch,softmax,eigen
controls=loss_free_softmax,no_offset,no_whitening,fixed_rank_E,rank_E,rank_2E

# compare CELL ROUTERS FLAG...: tunes, then compares.
compare() {
  local cell=$1 names=$2
  shift 2
  python -m train.compare --tune --workdir="$folder/$cell" --routers="$names" \
    --options=docs/studies/controls.json "$@" "${short[@]}"
  python -m train.compare --workdir="$folder/$cell" --routers="$names" --seeds=$seeds \
    --options="$folder/$cell/tuned.json" --json="$folder/$cell.json" "$@" "${short[@]}"
}

for cell in "${cells[@]}"; do
  task=${cell%_*} shape=${cell##*_}
  names=$routers
  case $task in
    fashion)
      # Unaugmented: the held-out images are not, and routers balance what they are trained on.
      flags=(--config=configs/vit_fashion_mnist.py --config.batch=64 --config.data.flip=False)
      names=$names,expert_choice
      hidden=192
      ;;
    sotu) flags=(--config=configs/lm_sotu.py "${text[@]}") hidden=256 ;;
    bytes) flags=(--config=configs/lm_sotu.py "${text[@]}" --config.data.tokenizer=bytes
        --config.data.vocab_size=258)
      hidden=256
      ;;
    shakespeare) flags=(--config=configs/lm_shakespeare.py "${text[@]}") hidden=256 ;;
  esac
  # As much is active in either shape: one expert of F, or two of F/2.
  case $shape in
    e8) flags+=(--config.moe.experts=8 --config.moe.top_k=1 "--config.moe.hidden=$hidden") ;;
    e32)
      flags+=(--config.moe.experts=32 --config.moe.top_k=2 "--config.moe.hidden=$((hidden / 2))")
      names=$names,$controls
      # Without a rank R = D: every basis spans the whole space, and a fixed one differs from a
      # tracked one by chance alone. Two cells show by how much that is.
      case $task in fashion | sotu) names=$names,fixed_basis ;; esac
      ;;
  esac
  compare "$cell" "$names" "${flags[@]}"
done
