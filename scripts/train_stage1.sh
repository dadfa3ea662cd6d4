#!/bin/sh
# Stage 1 of the training; see scripts/train_stage.sh for arguments and variables.
#   sh scripts/train_stage1.sh
#   RECIPE=configs/stages/stage1_nano.yaml sh scripts/train_stage1.sh schedule.max_steps=20
set -eu
cd "$(dirname "$0")/.."
. scripts/train_stage.sh
train_stage 1 "$@"
