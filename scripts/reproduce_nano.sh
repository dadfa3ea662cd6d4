#!/usr/bin/env bash
# Does a mixture of two experts keep both skills? Five ways to train at equal budget, and ablations of the mixture, on phantoms.
#   bash scripts/reproduce_nano.sh                        three seeds, a table in $MEDPLIB_RUNS/claim/table.md
#   bash scripts/reproduce_nano.sh --seeds 0 --steps 5    a quick look that proves nothing; --help tells the rest
#   MEDPLIB_RUNS   folder of everything that is made (default runs); what is already there is not made again
# Starts from the base of scripts/train_nano.sh, which is made first where it is missing. Two CPU cores, no GPU.
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment
export MEDPLIB_RUNS=${MEDPLIB_RUNS:-runs} PYTHONPATH="$PWD"
NANO_UNTIL=base bash scripts/train_nano.sh
exec python scripts/reproduce_nano.py --runs "$MEDPLIB_RUNS" "$@"
