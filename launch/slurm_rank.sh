#!/usr/bin/env bash
# One rank under srun: the names that torch.distributed knows for what SLURM says, then the command.
set -euo pipefail
export RANK="$SLURM_PROCID" LOCAL_RANK="$SLURM_LOCALID" WORLD_SIZE="$SLURM_NTASKS"
export LOCAL_WORLD_SIZE="$SLURM_NTASKS_PER_NODE"
exec "$@"
