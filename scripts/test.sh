#!/usr/bin/env bash
# Set up .venv/ and pass the tests. Arguments go to pytest: bash scripts/test.sh tests/modeling -k moe
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment dev
# One thread a process: more threads than cores is ruinous for models this small.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
exec python -m pytest "$@"
