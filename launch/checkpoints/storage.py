"""Which ranks see the same folder. All functions are collectives."""

from __future__ import annotations

import functools
import os
import uuid
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist


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


@functools.cache
def storage_of(folder: str) -> Storage:
    """One folder for all ranks, or one for each node."""
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


def gathered(value: Any, group: dist.ProcessGroup | None = None) -> list[Any]:
    """[world_size] the values of all ranks.

    Args:
        group: of all ranks; None: the one that training uses.
    """
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def broadcast(value: Any) -> Any:
    """Rank 0's."""
    values = [value]
    dist.broadcast_object_list(values, src=0)
    return values[0]


def partial_id(storage: Storage) -> int:
    """The same number for ranks that share a folder, another for others."""
    return 0 if storage.num_parts == dist.get_world_size() else dist.get_rank() // storage.num_parts
