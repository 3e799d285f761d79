#!/usr/bin/env bash
# The study of docs/routing.md: four tasks, two shapes of the experts, every router tuned on a seed
# of its own, in the environment that README makes. Some 800 runs of 50 to 260 s, as the core is.
#
#     docs/studies/study.sh FOLDER [CELL...]
#
# CELL is TASK_SHAPE, such as fashion_e32, and all of them if none is named. FOLDER takes
# TASK_tuned.json, CELL.json with all numbers, CELL.txt with the tables, and runs/. Stopped and
# started again it goes on where it was, also in a folder that holds the JSON files alone, such as
# docs/studies/results. SEEDS=2 makes fewer seeds than five; STAGE=routers leaves all controls to a
# later start, STAGE=controls those of gates and settling. Cells of different tasks may be made at
# the same time.
set -euo pipefail

if [ $# -eq 0 ]; then
  sed -n '2,12p' "$0" | cut -c3- >&2
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
stage=${STAGE:-all}
case $stage in
  routers | controls | all) ;;
  *)
    echo "STAGE=$stage: it is routers, controls or all" >&2
    exit 2
    ;;
esac

# One model for all tasks but for its ends: width 96, four blocks, each with experts.
short=(--config.steps=300 --config.optim.warmup=30 --config.settle=100
  --config.checkpoint.every=300)
text=(--config.model.width=96 --config.data.sequence_length=256 --config.batch=8)
routers=whitened,softmax_offset,loss_free,switch,softmax,eigen
# whitened with one part left out or its basis made smaller, at the option for which it was tuned. At
# width 96 its own basis spans the whole space, and so does not move.
controls=loss_free_softmax,no_offset,no_whitening,fixed_rank_E,rank_E,rank_2E
# Other gates: what the cost of a swap owes to them. More settling: what noise of batches is left.
# The fastest rate of loss_free's grid, which was tuned by its loss alone.
more=renormalized,sigmoid,softmax_offset_sigmoid,settle_300,loss_free_fast
e32=(--config.moe.experts=32 --config.moe.top_k=2 --config.moe.hidden=96)
e8=(--config.moe.experts=8 --config.moe.top_k=1 --config.moe.hidden=192)

mkdir -p "$folder"
for cell in "${cells[@]}"; do
  task=${cell%_*} names=$routers
  case $task in
    fashion)
      # Unaugmented: the held-out images are not, and routers balance what they are trained on.
      flags=(--config=configs/vit_fashion_mnist.py --config.batch=64 --config.data.flip=False)
      names=$names,expert_choice
      ;;
    sotu) flags=(--config=configs/lm_sotu.py "${text[@]}" --config.data.vocab_size=1024) ;;
    bytes) flags=(--config=configs/lm_sotu.py "${text[@]}" --config.data.tokenizer=bytes
      --config.data.vocab_size=258 --config.data.heldout_every=40) ;;
    shakespeare)
      flags=(--config=configs/lm_shakespeare.py "${text[@]}" --config.data.vocab_size=1024)
      ;;
  esac
  flags+=("${short[@]}")
  tuned=$folder/${task}_tuned.json results=$folder/$cell.json
  if ! [ -f "$tuned" ]; then
    # With the many experts, for either shape.
    python -m train.compare "${flags[@]}" "${e32[@]}" --config.eval_every=300 --tune \
      --workdir="$folder/runs/$task" --routers="$names,loss_free_softmax" \
      --options=docs/studies/controls.json
    cp "$folder/runs/$task/tuned.json" "$tuned"
  fi
  variants=docs/studies/controls.json
  case $cell in
    *_e8)
      flags+=("${e8[@]}")
      variants=$variants,docs/studies/controls_e8.json # whose ranks are other numbers
      ;;
    *) flags+=("${e32[@]}") ;;
  esac
  if [ "$stage" != routers ]; then names=$names,$controls; fi
  if [ "$stage" = all ]; then names=$names,$more; fi
  known=()
  if [ -f "$results" ]; then known=("--results=$results"); fi
  python -m train.compare "${flags[@]}" --config.eval_every=100 "${known[@]}" \
    --workdir="$folder/runs/$cell" --routers="$names" --seeds="${SEEDS:-5}" --baseline=whitened \
    --options="$variants,$tuned" --json="$results" > "$folder/$cell.txt.new"
  mv "$folder/$cell.txt.new" "$folder/$cell.txt"
done
