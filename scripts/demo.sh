#!/usr/bin/env bash
# The whole path on the embedded Stable Diffusion, minutes on a CPU. Takes the output folder (runs/demo).
set -euo pipefail
out="${1:-runs/demo}"
case "$out" in /*) ;; *) out="$PWD/$out" ;; esac # setup.sh changes to the repository's root
source "$(dirname "${BASH_SOURCE[0]}")/setup.sh"
erase demo --out "$out"
