"""What one rank of the check does: started by the deepspeed launcher, srun or torchrun as a rank of training would be.

    deepspeed --hostfile FILE --module largebatch.launch.doctor.rank_check --data DIR
    srun ... python -m largebatch.launch.doctor.rank_check --data DIR | largebatch doctor --read -

The first rank of each node reports on the node before it meets the others, so that a report also comes from a node that
the network does not reach.
"""

from __future__ import annotations

import argparse
import os
import sys
from typing import Any

from largebatch.launch.doctor import gathering, resources, software


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="largebatch.launch.doctor.rank_check", allow_abbrev=False)
    parser.add_argument("--data", metavar="DIR")
    parser.add_argument("--output", metavar="DIR", default="runs")
    parser.add_argument("--timeout", type=float, default=60.0, metavar="SECONDS", help="to wait for the other ranks")
    parser.add_argument("--local_rank", type=int, default=-1, help="given by the launcher")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Returns 0: what is wrong is in the records, and a launcher stops the other ranks when one of them fails."""
    arguments = parse_arguments(argv)
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    local_rank = max(0, int(os.environ.get("LOCAL_RANK", arguments.local_rank)))
    if local_rank == 0:
        gathering.emit("node", rank, node_report(data=arguments.data, output=arguments.output, world_size=world_size))
    if world_size > 1:
        check_network(rank, world_size, local_rank, output=arguments.output, timeout=arguments.timeout)
    return 0


def check_network(rank: int, world_size: int, local_rank: int, *, output: str, timeout: float) -> None:
    """Writes rank 0's figures, or what kept this rank from taking part."""
    from largebatch.launch.doctor import network

    def fail(message: str) -> None:
        gathering.emit("error", rank, {"host": resources.interfaces()["host"], "message": message[:1000]})

    def give_up() -> None:
        fail(f"the ranks have not met within {timeout:.0f} s")
        os._exit(0)

    try:
        folder = resources.existing_parent(output)
        figures = network.measure(rank, world_size, local_rank, folder=folder, timeout=timeout, on_timeout=give_up)
    except Exception as error:  # of gloo, NCCL or the store: each its own class; all mean that ranks do not meet
        fail(f"{type(error).__name__}: {error}")
    else:
        if rank == 0:
            gathering.emit("network", rank, figures)


def node_report(*, data: str | None, output: str, world_size: int = 1) -> dict[str, Any]:
    """Everything about this node that can be known without the others, as JSON types; bytes and seconds."""
    return {
        "world_size": world_size,
        "num_local_ranks": num_local_ranks(world_size),
        "versions": software.versions(),
        "executable": software.executable(),
        "import_problem": software.import_problem(),
        "code": software.code_digest(),
        "kernels": software.kernels(),
        "tools": software.tools(),
        "devices": resources.devices(),
        "memory": resources.memory(),
        "disk": resources.space(output),
        "shared_memory": resources.shared_memory(),
        "interfaces": resources.interfaces(),
        "limits": resources.limits(),
        "data": None if data is None else resources.data(data),
        "environment": software.environment(),
    }


def num_local_ranks(world_size: int) -> int:
    """Ranks on this node, by the names that the launchers give it: torchrun's, DeepSpeed's, SLURM's."""
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "SLURM_NTASKS_PER_NODE"):
        if os.environ.get(name, "").isdigit():
            return int(os.environ[name])
    return world_size


if __name__ == "__main__":
    sys.exit(main())
