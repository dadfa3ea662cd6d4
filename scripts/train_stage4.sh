#!/bin/sh
# Stage 4 of the training; see scripts/train_stage.sh for arguments and variables.
#   sh scripts/train_stage4.sh
#   RECIPE=configs/stages/stage4_nano.yaml sh scripts/train_stage4.sh schedule.max_steps=20
set -eu
cd "$(dirname "$0")/.."
. scripts/train_stage.sh
train_stage 4 "$@"
