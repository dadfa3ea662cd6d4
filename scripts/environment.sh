#!/usr/bin/env bash
# Sourced by the other scripts: makes .venv/ at the project's root and keeps it up to date.
#   source scripts/environment.sh; prepare_environment [EXTRA]
# PYTHON names the interpreter (default python3.11, else python3); TORCH_INDEX_URL another source for torch's wheels.

prepare_environment() {
  local extra=${1:-} python stamp wanted
  python=${PYTHON:-$(command -v python3.11 || command -v python3)} || { echo "Python 3.11 is needed; none was found." >&2; return 2; }
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || { echo "Python 3.11 or newer is needed; $python is older." >&2; return 2; }
  stamp=.venv/.installed${extra:+-$extra}
  wanted=$({ pwd; cat requirements.txt pyproject.toml; } | cksum) # a moved project needs its commands anew
  if [ ! -x .venv/bin/medplib ] || [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
    echo "Setting up .venv (a few minutes the first time) …"
    # Not only where there is none: Debian without python3-venv leaves one without pip behind.
    if ! .venv/bin/python -m pip --version > /dev/null 2>&1; then
      "$python" -m venv .venv || { echo "$python cannot make a virtual environment; on Debian install python3-venv." >&2; return 2; }
    fi
    if ! .venv/bin/python -c 'import torch' 2> /dev/null; then
      install_packages ${TORCH_INDEX_URL:+--index-url "$TORCH_INDEX_URL"} "$(grep -o '^torch==[^ ]*' requirements.txt)" || return 2
    fi
    install_packages --constraint requirements.txt --editable ".${extra:+[$extra]}" || return 2
    echo "$wanted" > "$stamp"
  fi
  export PATH="$PWD/.venv/bin:$PATH"
}

install_packages() {
  .venv/bin/python -m pip install --quiet --disable-pip-version-check "$@" && return
  echo "The installation failed; what pip said is above. By hand: .venv/bin/python -m pip install $*" >&2
  return 2
}
