#!/usr/bin/env bash
# Does a mixture of two experts keep both skills? Five ways to train at equal budget, and ablations of the mixture, on phantoms.
#   bash scripts/reproduce_nano.sh                        three seeds, a table in $MEDPLIB_RUNS/claim/table.md
#   bash scripts/reproduce_nano.sh --seeds 0 --steps 5    a quick look that proves nothing; --help tells the rest
#   MEDPLIB_RUNS   folder of everything that is made (default runs); what is already there is not made again
# Data and towers are those of scripts/train_nano.sh, made first where they are missing. Two CPU cores, no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment
export MEDPLIB_RUNS=${MEDPLIB_RUNS:-runs} PYTHONPATH="$PWD"
NANO_UNTIL=towers bash scripts/train_nano.sh
start=$MEDPLIB_RUNS/claim/start
mkdir -p "$start"
for part in pool pool_held_out tokenizer vision.safetensors sam.safetensors; do
  ln -sfn "$(realpath "$MEDPLIB_RUNS/nano/$part")" "$start/$part"
done
pretrain() { # pretrain STEP FILE: makes FILE, unless it is there
  [ -e "$start/$2" ] ||
    OMP_NUM_THREADS=2 python -m model.train.pretrain "$1" --config configs/nano/pretrain_claim.yaml --out "$start"
}
pretrain language language.safetensors
pretrain seen seen.safetensors
pretrain base base/config.json
exec python scripts/reproduce_nano.py --runs "$MEDPLIB_RUNS" "$@"
