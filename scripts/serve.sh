#!/usr/bin/env bash
# Set up .venv/ and serve: page and API, until Ctrl-C. Arguments go to medplib serve: bash scripts/serve.sh --model DIR
set -euo pipefail
cd "$(dirname "$0")/.."
source scripts/environment.sh
prepare_environment serve
exec medplib serve "$@"
