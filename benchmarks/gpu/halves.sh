#!/usr/bin/env bash
# Copies packed CIFAR-10 in two halves of 48 MiB, for a machine that takes 64 MiB at a time; see benchmarks/gpu/data.py.
#
#   bash benchmarks/gpu/halves.sh PACKED [DIR]        # makes DIR/cifar10-a and DIR/cifar10-b; DIR is build unless given
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)"
packed="$1" folder="${2:-$root/build}"
copy() {
  mkdir -p "$folder/$1"
  for batch in "${@:2}"; do cp -r "$packed/$batch" "$packed/$batch.frame.xz" "$folder/$1"; done
  cp "$packed/unpack.py" "$folder/$1"
}
copy cifar10-a data_batch_1 data_batch_2 data_batch_3
copy cifar10-b data_batch_4 data_batch_5 test_batch
cp "$packed/batches.meta" "$folder/cifar10-b"
chmod -R u+w "$folder/cifar10-a" "$folder/cifar10-b"
du -sm "$folder/cifar10-a" "$folder/cifar10-b"
