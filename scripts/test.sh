#!/usr/bin/env bash
# Set up .venv/ and pass the tests, one process a core (8 at most). Arguments go to pytest:
#   bash scripts/test.sh tests/modeling -k moe
#   bash scripts/test.sh -n 0 --pdb          # one process
#   bash scripts/test.sh -m "not slow"       # markers: pyproject.toml
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment dev
# One thread a process: more threads than cores is ruinous for models this small.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1} TOKENIZERS_PARALLELISM=false
# A file's tests stay in one process, so that its servers and models are made once; tests/conftest.py orders the files.
workers="-n $(getconf _NPROCESSORS_ONLN) --maxprocesses 8 --dist loadfile --no-loadscope-reorder"
exec python -m pytest $workers "$@"
