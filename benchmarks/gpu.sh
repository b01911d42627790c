#!/bin/bash
# Everything worth knowing of one 80 GB GPU, in at most 9 minutes and without a network, into one folder: see gpu.py.
#   bash benchmarks/gpu.sh [--out FOLDER] [--tokens FILE] [--wheels FOLDER] [--parts trees,steps]
#   bash benchmarks/gpu.sh --smoke        the same code on a CPU, at tiny shapes
set -euo pipefail
exec "${PYTHON:-python}" "$(dirname "${BASH_SOURCE[0]}")/gpu.py" "$@"
