#!/usr/bin/env bash
# Trains on every node of a hostfile over ssh, after `largebatch doctor` has found nothing that would make the run fail:
#   bash launch/ssh_nodes.sh HOSTFILE --deepspeed_config RECIPE --data DIR --output DIR [arguments of launch/train.py]
# LAUNCHER_OPTIONS goes to both as it is, e.g. "--master_addr 10.0.0.1 --ssh_port 2222". See docs/cluster.md.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [ $# -lt 1 ] || [ ! -f "$1" ]; then
  echo "usage: bash launch/ssh_nodes.sh HOSTFILE [arguments of launch/train.py]; the hostfile has lines 'NAME slots=N'" >&2
  exit 2
fi
hostfile="$1"
shift
if [ -x "$root/.venv/bin/python" ]; then
  export PATH="$root/.venv/bin:$PATH"
fi
read -r -a launcher_options <<< "${LAUNCHER_OPTIONS:-}"

folders=()
previous=""
for argument in "$@"; do
  case "$previous" in --data | --output) folders+=("$previous" "$argument") ;; esac
  case "$argument" in --data=* | --output=*) folders+=("$argument") ;; esac
  previous="$argument"
done
largebatch doctor --hostfile "$hostfile" "${launcher_options[@]}" "${folders[@]}"
exec deepspeed --hostfile "$hostfile" "${launcher_options[@]}" "$root/launch/train.py" "$@"
