#!/bin/sh
# Stage 2 of the training; see scripts/train_stage.sh for arguments and variables.
#   sh scripts/train_stage2.sh
#   RECIPE=configs/stages/stage2_nano.yaml sh scripts/train_stage2.sh schedule.max_steps=20
set -eu
cd "$(dirname "$0")/.."
. scripts/train_stage.sh
train_stage 2 "$@"
