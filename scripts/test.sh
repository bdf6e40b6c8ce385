#!/usr/bin/env bash
# Every check, and the tests that are not marked slow; with --all, as CI runs it, those too.
# Other arguments go to pytest: `bash scripts/test.sh -k saliency`.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"

step() {
  printf '\n== %s\n' "$*"
  "$@"
}

step ruff format --check
step ruff check
step mypy
step lint-imports
step codespell
# A file's tests share fixtures, so they stay together; a process a core, each with one thread.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
unset PYTHONDONTWRITEBYTECODE  # each process would compile every test anew
if [ "${1:-}" = --all ]; then shift; else set -- -m "not slow" "$@"; fi
step pytest -q --numprocesses auto --dist loadfile "$@"
