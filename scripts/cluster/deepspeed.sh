#!/usr/bin/env bash
# One training stage over the machines of a hostfile, through DeepSpeed's launcher.
#   bash scripts/cluster/deepspeed.sh HOSTFILE RECIPE [key=value …] [--resume]
# HOSTFILE has a line "NAME slots=GPUS" for each machine, as scripts/cluster/hostfile.example. From this one, the first,
# each must be reached by ssh without a password (and pdsh be installed), and have this folder, .venv, data and runs at
# the same paths. Variables MEDPLIB_… are passed on to all.
set -euo pipefail
if [ $# -lt 2 ]; then
  echo "usage: bash scripts/cluster/deepspeed.sh HOSTFILE RECIPE [key=value …] [--resume]" >&2
  exit 2
fi
hostfile=$1
shift
if [ ! -r "$hostfile" ]; then # DeepSpeed would train on this machine alone
  echo "$hostfile cannot be read; see scripts/cluster/hostfile.example" >&2
  exit 2
fi
hostfile=$(cd "$(dirname "$hostfile")" && pwd)/$(basename "$hostfile")
cd "$(dirname "$0")/../.."
[ ! -x .venv/bin/python ] || PATH="$PWD/.venv/bin:$PATH"
export PATH PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}" OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
python -m model.train "$@" --check
variables=$(mktemp)
trap 'rm -f "$variables"' EXIT
env | grep -E '^(MEDPLIB_[A-Z_]+|OMP_NUM_THREADS)=' > "$variables"
DS_ENV_FILE=$variables deepspeed --hostfile "$hostfile" --module model.train "$@"
