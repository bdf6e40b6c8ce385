#!/usr/bin/env bash
# Every check that CI makes. Arguments go to pytest: `bash scripts/test.sh -m "not slow"`, `-k saliency`.
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
step pytest -q --numprocesses auto --dist loadfile "$@"
