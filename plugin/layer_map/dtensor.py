"""Parameters that are DTensors: which elements of the layer this rank holds, and which ranks hold the rest.

FSDP2 (``fully_shard``), HSDP, and torch's tensor parallelism (``parallelize_module``) keep a layer as one DTensor over a mesh
of ranks. Along a mesh dimension it is either cut (Shard) or copied (Replicate). The sums of squares of the whole layer
are those of this rank's part, added up over the mesh dimensions along which it is cut.
"""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard, placement_types

from largebatch.layer_map.segment import LayerMap, Segment

CUT = (Shard, *filter(None, [getattr(placement_types, "_StridedShard", None)]))
"""FSDP2 over tensor parallelism along the same dimension gives _StridedShard, which is no Shard in newer versions of torch."""


def local_part(tensor: Tensor) -> Tensor:
    """What this rank holds of a DTensor, sharing its memory; any other tensor itself. Call it without gradients."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def local_gradient(parameter: Tensor) -> Tensor | None:
    """What this rank holds of the gradient, placed as the parameter is: one that is not is redistributed (a collective)."""
    grad = parameter.grad
    if isinstance(parameter, DTensor) and grad is not None and grad.placements != parameter.placements:
        grad = grad.redistribute(placements=parameter.placements)
    return None if grad is None else local_part(grad)


def process_groups_of(parameter: DTensor) -> tuple[dist.ProcessGroup, ...]:
    """One group for each mesh dimension along which the layer is cut; the sums are to be added over each in turn.

    Raises:
        RuntimeError: the parameter holds unreduced values, of which no norm can be taken.
    """
    groups = []
    for dimension, placement in enumerate(parameter.placements):
        if isinstance(placement, CUT):
            groups.append(parameter.device_mesh.get_group(dimension))
        elif not placement.is_replicate():
            raise RuntimeError(
                f"a parameter of shape {tuple(parameter.shape)} is placed as {parameter.placements}; expected Shard and "
                "Replicate only, because the norm of a layer needs its values"
            )
    return tuple(groups)


def layer_map_of(parameter: DTensor) -> LayerMap:
    """The map of this rank's part, numbered within that part: which elements of the layer they are is not said."""
    numel = parameter.to_local().numel()
    return LayerMap((parameter.numel(),), numel, (Segment(0, 0, numel, 0),) if numel else ())
