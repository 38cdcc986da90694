"""A flat tensor, the layers in it, and the ranks that hold the rest of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch.distributed as dist
from torch import Tensor

from largebatch.layer_map.segment import Cut, LayerMap


@dataclass(frozen=True)
class Partition:
    """A flat tensor that stands in for parameters: what an engine hands to the optimizer in their place.

    Attributes:
        layer_map: which elements of which layer the tensor holds.
        parameters: [num_layers] the model's parameters, numbered as in ``layer_map``.
        process_group: the ranks that hold the rest of these layers; None if this one holds all.
        cut: what the other ranks of the group hold; None if that is not known.
    """

    layer_map: LayerMap
    parameters: tuple[Tensor, ...]
    process_group: dist.ProcessGroup | None
    cut: Cut | None = None
