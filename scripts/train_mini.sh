#!/usr/bin/env bash
# A round of MedPLIB-mini's training: from its weights so far, phantoms and the real sets of MEDPLIB_REAL
# (default ../shared/real). Its first round began with MedPLIB-nano (`start` in configs/mini/pretrain.yaml).
#   bash scripts/train_mini.sh
#   MEDPLIB_RUNS   folder of everything that is made (default runs); what is already there is not made again
#   MINI_UNTIL     data, towers or joint stops after that step
# Two CPU cores, 12 GB of memory and disk; the model card states the hours. Started again, it goes on where it ended.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment
export MEDPLIB_RUNS=${MEDPLIB_RUNS:-runs} PYTHONPATH="$PWD"
mini=$MEDPLIB_RUNS/mini
mkdir -p "$mini/data"

phantoms() { # phantoms NAME IMAGES SEED
  [ -e "$mini/data/phantoms/$1/grounding.json" ] ||
    medplib data build phantom --out "$mini/data/phantoms/$1" --num-images "$2" --seed "$3" --workers 2
}
built() { # built SOURCE OUT
  [ -e "$2/dataset.json" ] || medplib data build "$1" --out "$2" --workers 2
}
pretrain() { # pretrain STEP FILE
  [ -e "$mini/$2" ] || OMP_NUM_THREADS=1 python -m model.train.pretrain.mini "$1" --data "$mini/data" --out "$mini"
}
train() { # train RECIPE NAME OVERRIDES…
  local recipe=$1 name=$2
  shift 2
  [ -e "$mini/$name/merged/config.json" ] ||
    python -m model.train "$recipe" --resume output="$mini/$name" "$@"
  # A run that gets a signal saves, and exits with 0, too.
  [ -e "$mini/$name/merged/config.json" ] || { echo "$name is not finished; run this again to go on." >&2; exit 3; }
}
trap 'kill $(jobs -p) 2>/dev/null || true' EXIT

[ -e "$mini/sources/all/meta.csv" ] || python scripts/mini_sources.py --out "$mini/sources"
for set in "$mini"/sources/*/; do
  name=$(basename "$set")
  [ "$name" = all ] || built "$set" "$mini/data/$name"
done
built "$mini/sources/all" "$mini/mix"
phantoms train 8000 4000
phantoms validation 200 8000
phantoms test 400 9000
[ "${MINI_UNTIL:-}" != data ] || exit 0

pretrain pool pool_validation/index.json
pretrain sam sam.safetensors & sam=$!
pretrain vision vision.safetensors & vision=$!
wait "$sam" && wait "$vision"
pretrain base base/config.json
[ "${MINI_UNTIL:-}" != towers ] || exit 0

train configs/mini/joint.yaml joint
[ "${MINI_UNTIL:-}" != joint ] || exit 0

# The last, short stage, from three seeds: the first is the model, all of them give the spread of its figures.
for seed in 0 1 2; do
  train configs/mini/joint.yaml "last$seed" model.base="$mini/joint/merged" seed="$seed" schedule.max_steps=300 \
    optimizer.lr=1.5e-4 validation.every=300
  [ -e "$mini/eval/$seed/report.json" ] ||
    medplib eval "$mini/last$seed" "$mini/mix" --split test --out "$mini/eval/$seed"
done
[ -e "$mini/medplib-mini/config.json" ] || medplib export "$mini/last0" "$mini/medplib-mini" --dtype float16
python scripts/mini_report.py --mini "$mini" --out "$mini/report.json" "$mini"/eval/[012]
python scripts/nano_report.py --data "$mini/data/phantoms/test" --train "$mini/data/phantoms/validation" \
  --out "$mini/phantoms.json" mini="$mini/medplib-mini"
