#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv/ at the project's root and keeps it up to date.
#   source scripts/environment.sh; prepare_environment [EXTRA]
# PYTHON names the interpreter (default python3.11, else python3); TORCH_INDEX_URL another source for torch's wheels.

prepare_environment() {
  local extra=${1:-} python stamp wanted
  python=${PYTHON:-$(command -v python3.11 || command -v python3)} || { echo "Python 3.11 is needed; none was found." >&2; return 2; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $python is older." >&2; return 2; }
  stamp=.venv/.installed${extra:+-$extra}
  wanted=$(cat requirements.txt setup.py | cksum)
  if [ ! -x .venv/bin/medplib ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Setting up .venv (a few minutes the first time) …"
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    if ! .venv/bin/python -c 'import torch' 2>/dev/null; then
      .venv/bin/python -m pip install --quiet --disable-pip-version-check ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep -o '^torch==[^ ]*' requirements.txt)" 2>&1 | grep -v '^WARNING: Location' || true
    fi
    .venv/bin/python -m pip install --quiet --disable-pip-version-check --editable ".${extra:+[$extra]}" 2>&1 | { grep -v '^WARNING: Location' || true; }
    [ -x .venv/bin/medplib ] || { echo "The installation failed; run it by hand to see why: .venv/bin/python -m pip install -e ." >&2; return 2; }
    echo "$wanted" > "$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}
