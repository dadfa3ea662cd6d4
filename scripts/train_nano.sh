#!/usr/bin/env bash
# MedPLIB-nano from an empty disk: phantoms, tokenizer, CLIP and SAM towers, language model, stages I to IV, its table.
#   bash scripts/train_nano.sh
#   MEDPLIB_RUNS   folder of everything that is made (default runs); what is already there is not made again
#   NANO_UNTIL     towers stops before the language model, base before stage I
# Two CPU cores, at most two hours, 6 GB of memory and 5 GB of disk. Two jobs of one thread beat one of two.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment
export MEDPLIB_RUNS=${MEDPLIB_RUNS:-runs} PYTHONPATH="$PWD"
nano=$MEDPLIB_RUNS/nano
data=$nano/phantoms
export MEDPLIB_DATA=$data/train MEDPLIB_VALIDATION=$data/validation/grounding.json
export MEDPLIB_VALIDATION_IMAGES=$data/validation
mkdir -p "$nano"

pretrain() { # pretrain STEP FILE: makes FILE, unless it is there
  [ -e "$nano/$2" ] || OMP_NUM_THREADS=1 python -m model.train.pretrain "$1" --out "$nano"
}
phantoms() { # phantoms NAME IMAGES SEED
  [ -e "$data/$1/grounding.json" ] || medplib data build phantom --out "$data/$1" --num-images "$2" --seed "$3" --workers 2
}
stage() { # stage N OVERRIDES…
  local number=$1
  shift
  [ -e "$nano/stage$number/merged/config.json" ] ||
    OMP_NUM_THREADS=1 python -m model.train "configs/stages/stage${number}_nano.yaml" --resume "$@"
  # A run that was told to end has saved and exits with 0, too.
  [ -e "$nano/stage$number/merged/config.json" ] || { echo "Stage $number is not finished; run this again to go on." >&2; exit 3; }
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT
both() { # both JOB JOB: side by side; stops if either fails
  $1 & local first=$!
  $2 & local second=$!
  wait "$first" && wait "$second"
}
language_then_sam() { pretrain language language.safetensors && pretrain sam sam.safetensors; }
vision() { pretrain vision vision.safetensors; }
seen() {
  until [ -e "$nano/language.safetensors" ] && [ -e "$nano/vision.safetensors" ]; do
    kill -0 $$ 2>/dev/null || return 1
    sleep 2
  done
  pretrain seen seen.safetensors
}
vision_then_seen() { vision && seen; }

phantoms train 1600 4000
phantoms validation 48 8000
phantoms test 400 9000
pretrain pool pool_held_out/questions.jsonl
pretrain tokenizer tokenizer/tokenizer.model
if [ "${NANO_UNTIL:-}" = towers ]; then
  both "pretrain sam sam.safetensors" vision
  exit 0
fi
both language_then_sam vision_then_seen
pretrain base base/config.json
[ "${NANO_UNTIL:-}" != base ] || exit 0
# The base can answer and paint already; the stages go on from there in short runs of 16 records a step, at rates low
# enough to lose little of it: at 5e-4, "is it a …?" about regions fell from 0.92 to 0.87.
short="schedule.batch_size=16 schedule.epochs=2 validation.samples=32 saving.every=100 data.workers=1 data.feature_cache=$nano/features"
stage 1 $short schedule.max_steps=40 optimizer.lr=3e-4
stage 2 $short schedule.max_steps=200 optimizer.lr=1e-4 "trainable=[decoder, lm_head, projector, region_adapter]"
stage 3 $short schedule.max_steps=220 optimizer.lr=2e-4
stage 4 $short schedule.max_steps=400 optimizer.lr=2e-4 "data.shares=[0.3, 0.3, 0.4]"
python scripts/nano_report.py --data "$data/test" --train "$data/train" --out "$nano/report.json" \
  "stage I=$nano/stage1/merged" "stage II=$nano/stage2/merged" "stage III=$nano/stage3/merged" "stage IV=$nano/stage4/merged"
python scripts/nano_pack.py "$nano/stage4/merged" "$nano/report.json" "$nano/medplib-nano"
echo "MedPLIB-nano is in $nano/medplib-nano."
