#!/usr/bin/env bash
# Sets up .venv with the test extra if needed, then runs the tests, one worker a core (at most four), file by file.
#
#   bash launch/test.sh              everything but what takes long and what needs an ssh server
#   bash launch/test.sh --full       what takes long, too: the whole exactness matrix, every launch
#   bash launch/test.sh --hosts      the tests with two hosts, too; as root it installs an ssh server and pdsh if they are missing
#   bash launch/test.sh --gpu        the tests that need a GPU, alone
#   bash launch/test.sh ARGUMENTS    what pytest makes of them
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
full="not full" hosts="not hosts" arguments=() paths=()
while [ $# -gt 0 ]; do
  case "$1" in
    --full) full="" ;;
    --hosts) hosts="" ;;
    --gpu) paths=(tests/kernels/test_gpu.py) ;;
    *) arguments+=("$1") ;;
  esac
  shift
done
source launch/environment.sh test
[ -n "$hosts" ] || source launch/host_tools.sh
# the Triton kernels' way to a GPU is tested with an older Triton, too, which lies beside the installed one
other_triton=3.6.0
if [ ! -d ".venv/triton-$other_triton" ] && python -c 'import triton' 2>/dev/null; then
  python -m pip install --quiet --disable-pip-version-check --no-deps --target ".venv/triton-$other_triton.part" \
    "triton==$other_triton" && mv ".venv/triton-$other_triton.part" ".venv/triton-$other_triton"
fi
selection="${full}${full:+${hosts:+ and }}${hosts}"
# who names tests means those
[ "${#arguments[@]}" -eq 0 ] || selection=""
workers="$(nproc)"
export DS_ACCELERATOR="${DS_ACCELERATOR:-cpu}"
exec python -m pytest --numprocesses "$((workers < 4 ? workers : 4))" --dist loadfile --no-loadscope-reorder ${selection:+-m "$selection"} \
  "${paths[@]}" "${arguments[@]}"
