#!/usr/bin/env bash
# All checks and measurements that need a GPU, on a machine without network: bash benchmarks/gpu.sh --help
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
PYTHONPATH="$root/benchmarks${PYTHONPATH:+:$PYTHONPATH}" exec "${PYTHON:-python3}" -m gpu.stages "$@"
