# shellcheck shell=bash
# Sourced by the other scripts: makes .venv with everything installed, and puts it first in PATH.
#
# On Linux, PyPI's torch brings several GB of CUDA libraries. For a machine without a GPU, choose another index:
#   TORCH_INDEX_URL=https://download.pytorch.org/whl/cpu bash scripts/test.sh
# It is asked beside the usual index; its build (2.13.0+cpu) sorts above the plain one and so is the one taken.
# PYTHON chooses the interpreter that makes .venv (default python3).

ROOT="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$ROOT"

setup() {
  local venv=.venv stamp=.venv/.erase-setup wanted
  local -a pip index=()
  if [ ! -x "$venv/bin/python" ]; then
    local python="${PYTHON:-python3}"
    if ! command -v "$python" >/dev/null; then
      echo "setup: no '$python' found; install Python 3.11 or newer, or set PYTHON" >&2
      return 1
    fi
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
      echo "setup: erase needs Python 3.11 or newer; '$python' is $("$python" -V 2>&1); set PYTHON" >&2
      return 1
    fi
    echo "setup: creating $venv" >&2
    "$python" -m venv "$venv" || return 1
  fi
  wanted="$(cat pyproject.toml constraints.txt | "$venv/bin/python" -c \
    'import hashlib, sys; print(hashlib.sha256(sys.stdin.buffer.read()).hexdigest(), sys.prefix)')" || return 1
  if [ ! -f "$stamp" ] || [ "$(cat "$stamp")" != "$wanted" ]; then
    echo "setup: installing into $venv (the first time takes minutes)" >&2
    if [ -n "${TORCH_INDEX_URL:-}" ]; then index=(--extra-index-url "$TORCH_INDEX_URL"); fi
    pip=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c constraints.txt)
    "${pip[@]}" ${index[@]+"${index[@]}"} "$(grep '^torch==' constraints.txt)" || return 1
    "${pip[@]}" -e ".[dev]" || return 1
    echo "$wanted" >"$stamp"
  fi
  export PATH="$ROOT/$venv/bin:$PATH"
}

setup || exit 1
