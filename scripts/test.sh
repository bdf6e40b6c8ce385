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
step pytest -q "$@"
