#!/usr/bin/env bash
# Sets up .venv with the test extra if needed, then runs the tests. Arguments go to pytest.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/environment.sh test
if [ $# -eq 0 ]; then
  source launch/host_tools.sh
fi
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
exec python -m pytest "$@"
