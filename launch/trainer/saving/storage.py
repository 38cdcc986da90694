"""Which ranks see the same folder. All functions are collectives."""

from __future__ import annotations

import functools
import os
import uuid
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from largebatch.engine.checkpoint.agreement import gathered, raise_together


@dataclass(frozen=True)
class Storage:
    """Which ranks see the same folder, and what each does for it.

    Attributes:
        part, num_parts: this rank's share of the checksums, among the ranks that see the folder.
        is_owner: of these ranks, the one that renames and removes.
    """

    part: int
    num_parts: int
    is_owner: bool

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see the folder."""
        return self.num_parts == dist.get_world_size()


@functools.cache
def storage_of(folder: str) -> Storage:
    """One folder for all ranks, or one for each node."""
    with raise_together(f"the folder {folder!r} cannot be made; choose another --output"):
        os.makedirs(folder, exist_ok=True)
    rank, world_size = dist.get_rank(), dist.get_world_size()
    name = broadcast(f".seen-{uuid.uuid4().hex}")
    token = os.path.join(folder, name)
    if rank == 0:
        open(token, "w").close()
    dist.barrier()
    is_shared = all(gathered(os.path.exists(token)))
    dist.barrier()
    if rank == 0:
        os.remove(token)
    if is_shared:
        return Storage(rank, world_size, rank == 0)
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_size = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE", 1))
    return Storage(local_rank, local_size, local_rank == 0)


def broadcast(value: Any) -> Any:
    """Rank 0's."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def partial_id(storage: Storage) -> int:
    """The same number for ranks that share a folder, another for others."""
    return 0 if storage.is_shared else dist.get_rank() // storage.num_parts


def follow_storage(config: dict[str, Any], folder: str) -> str:
    """Has DeepSpeed write whole checkpoints on every node where each has a folder of its own.

    Args:
        config: a ds_config; written.
        folder: of the checkpoints.

    Returns:
        A line that says so, "" where all ranks see the same folder.

    Raises:
        ValueError: the ds_config says otherwise.
    """
    section = config.get("checkpoint", {})
    if storage_of(os.path.abspath(folder)).is_shared or section.get("use_node_local_storage") is True:
        return ""
    if section.get("use_node_local_storage") is False:
        raise ValueError(
            f"checkpoint.use_node_local_storage is false, and the nodes do not see the same folder {folder!r}: no node but the "
            "first would have the model's file. Set it to true, leave it out, or choose an --output that all nodes see"
        )
    config["checkpoint"] = section | {"use_node_local_storage": True}
    return (
        f"{folder!r} is another folder on each node, so every node keeps the checkpoints of its own ranks "
        "(checkpoint.use_node_local_storage is set to true); --resume needs each rank on the node where it was"
    )
