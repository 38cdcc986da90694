"""A run without a launcher: one process that is its own world."""

from __future__ import annotations

import os

from largebatch.launch.ports import free_port

MPI_VARIABLES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")


def is_launched() -> bool:
    """Whether a launcher has told this process its rank (deepspeed, torchrun, SLURM's script), or MPI will."""
    return "RANK" in os.environ or any(name in os.environ for name in MPI_VARIABLES)


def be_the_only_rank() -> None:
    """Sets what a launcher would have set for one rank on this machine."""
    os.environ.update(
        RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", LOCAL_WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(free_port())
    )  # fmt: skip
    print("largebatch: started without a launcher: one rank (several: deepspeed launch/train.py ...)", flush=True)
