"""Which parameters of a DeepSpeed engine are parts of layers that tensor parallelism has cut, and over which ranks.

Megatron's layers and DeepSpeed's AutoTP mark such parameters with an attribute, by which DeepSpeed, too, knows them when it
takes the norm of the gradients. Parameters without it are held whole, with the same values, on every rank of the group.
"""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor

from largebatch.optim.layer_table import TENSOR_PARALLEL_MARKS, is_tensor_parallel

GROUP_GETTERS = ("get_tensor_model_parallel_group", "get_slice_parallel_group", "get_model_parallel_group")
"""Methods of an mpu: today's of Megatron and DeepSpeed, that of DeepSpeed's pipeline grid (whose model parallel group is the
stages), and the older one of Megatron."""


def tensor_parallel_group(engine: Any) -> dist.ProcessGroup | None:
    """The ranks over which layers are cut; None without tensor parallelism. ``engine.mpu`` is Megatron's or DeepSpeed's own."""
    for name in GROUP_GETTERS:
        getter = getattr(engine.mpu, name, None)
        if getter is not None:
            group = getter()
            return group if group is not None and dist.get_world_size(group) > 1 else None
    return None


def read_cuts(engine: Any) -> dict[Tensor, dist.ProcessGroup]:
    """{parameter that is a part of a layer: the ranks that hold its parts}.

    Raises:
        ValueError: there is tensor parallelism, but no parameter says that it is cut.
    """
    group = tensor_parallel_group(engine)
    if group is None:
        return {}
    cuts = {parameter: group for parameter in engine.module.parameters() if is_tensor_parallel(parameter)}
    if not cuts:
        raise ValueError(
            f"tensor parallelism over {dist.get_world_size(group)} ranks is on, and no parameter is marked as cut; expected "
            f"{TENSOR_PARALLEL_MARKS[0]}=True on each parameter that is a part of a layer (as Megatron's layers and DeepSpeed's AutoTP do), "
            "because its norm is that of all parts"
        )
    return cuts
