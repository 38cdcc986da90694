#!/usr/bin/env bash
# Makes the folder of wheels that benchmarks/gpu.sh installs on a machine without network; run it on one that has it.
#
#   bash benchmarks/gpu/wheels.sh [DIR]        # build/wheels unless given
#
# DeepSpeed has no wheel on PyPI: its own is made here, without compiled operators, which needs torch (any version).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
folder="${1:-$root/build/wheels}"
python="${PYTHON:-python3}"
list="$root/benchmarks/gpu/wheels.txt"
mkdir -p "$folder"

target=(--python-version 3.12 --implementation cp)
for platform in manylinux_2_28 manylinux_2_17 manylinux2014; do target+=(--platform "${platform}_x86_64"); done
grep -v -e '^#' -e '^deepspeed' "$list" |
  "$python" -m pip download -q --no-deps --only-binary=:all: "${target[@]}" -d "$folder" -r /dev/stdin
DS_BUILD_OPS=0 DS_ACCELERATOR=cpu "$python" -m pip wheel -q --no-deps --no-build-isolation -w "$folder" "$(grep '^deepspeed' "$list")"
du -ch "$folder"/*.whl
