#!/usr/bin/env bash
# Sets up .venv with the test extra if needed, then runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh test
if [ $# -eq 0 ]; then
  source launch/host_tools.sh
fi
# the Triton kernels' way to a GPU is tested with an older Triton, too, which lies beside the installed one
other_triton=3.6.0
if [ ! -d ".venv/triton-$other_triton" ] && python -c 'import triton' 2>/dev/null; then
  python -m pip install --quiet --disable-pip-version-check --no-deps --target ".venv/triton-$other_triton.part" \
    "triton==$other_triton" && mv ".venv/triton-$other_triton.part" ".venv/triton-$other_triton"
fi
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
exec python -m pytest "$@"
