"""Sums over a rank's segments -> sums over whole layers."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor


def all_reduce_sums_(sums: Tensor, process_group: dist.ProcessGroup | None) -> Tensor:
    """Adds the sums of all ranks of the partition group, in place where it can; every rank gets the same bits.

    Args:
        sums: fp64. A rank that owns nothing of a layer passes 0.
        process_group: the ranks among which the layers are partitioned; None if they are not.

    Returns:
        fp64, as ``sums``, on its device. No collective is called in a group of one rank.
    """
    if process_group is None or dist.get_world_size(process_group) == 1:
        return sums
    # offloaded partitions lie on the CPU while their group may only know the accelerator
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(process_group) == "nccl" else None
    reduced = sums if device is None else sums.to(device)
    dist.all_reduce(reduced, group=process_group)
    return reduced.to(sums.device)
